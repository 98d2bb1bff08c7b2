//! FindCoordinator, versions 0 to 6: this broker coordinates every group. Transaction and share coordinators (types 1
//! and 2) are refused in words.

use std::rc::Rc;

use kafka_protocol::{
    ResponseError,
    messages::{FindCoordinatorRequest, FindCoordinatorResponse, find_coordinator_response::Coordinator},
    protocol::StrBytes,
};

use crate::{kafka::errors::Failure, node::Node};

fn check(key_type: i8, key: &str) -> Result<(), Failure> {
    match key_type {
        0 if key.is_empty() => Err(ResponseError::InvalidGroupId.into()),
        0 => Ok(()),
        // The one code that every client takes as final: anything else is tried again for ever.
        1 => Err(Failure::new(
            ResponseError::TransactionalIdAuthorizationFailed,
            "transactions are not supported by Millrace yet: use a producer without transactional.id",
        )),
        _ => Err(Failure::new(
            ResponseError::InvalidRequest,
            format!("coordinators of type {key_type} are not supported by Millrace yet"),
        )),
    }
}

/// Handles a request.
pub async fn handle(node: &Rc<Node>, version: i16, request: FindCoordinatorRequest) -> FindCoordinatorResponse {
    let endpoints = node.endpoints();
    let at = endpoints.coordinator();
    let (id, host, port) = (at.id, StrBytes::from_string(at.host.clone()), i32::from(at.port));
    if version >= 4 {
        let coordinators = request
            .coordinator_keys
            .into_iter()
            .map(|key| {
                let found = check(request.key_type, &key);
                let coordinator = Coordinator::default().with_key(key);
                match found {
                    Ok(()) => coordinator
                        .with_node_id(id.into())
                        .with_host(host.clone())
                        .with_port(port),
                    Err(failure) => coordinator
                        .with_node_id((-1).into())
                        .with_port(-1)
                        .with_error_code(failure.code())
                        .with_error_message(failure.text()),
                }
            })
            .collect();
        return FindCoordinatorResponse::default().with_coordinators(coordinators);
    }
    match check(request.key_type, &request.key) {
        Ok(()) => FindCoordinatorResponse::default()
            .with_node_id(id.into())
            .with_host(host)
            .with_port(port),
        Err(failure) => FindCoordinatorResponse::default()
            .with_node_id((-1).into())
            .with_port(-1)
            .with_error_code(failure.code())
            .with_error_message(if version >= 1 { failure.text() } else { None }),
    }
}
