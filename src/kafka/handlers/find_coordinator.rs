//! FindCoordinator, versions 0 to 6: a group is coordinated by the leader of its partition of the offsets topic. Transaction and share coordinators (types 1
//! and 2) are refused in words.

use std::rc::Rc;

use kafka_protocol::{
    ResponseError,
    messages::{FindCoordinatorRequest, FindCoordinatorResponse, find_coordinator_response::Coordinator},
    protocol::StrBytes,
};

use crate::{
    coordinator::groups::partition_of,
    endpoints::Endpoint,
    kafka::{errors::Failure, repeats},
    node::{Node, OFFSETS_TOPIC},
};

fn check(key_type: i8) -> Result<(), Failure> {
    match key_type {
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

/// The broker that coordinates a group: the leader of its partition of the offsets topic, which is made if it is not there.
async fn coordinator(node: &Rc<Node>, key_type: i8, group: &str) -> Result<Endpoint, Failure> {
    check(key_type)?;
    if node.view().image.topic(OFFSETS_TOPIC).is_none() {
        node.router
            .call(
                node,
                0,
                |n| async move { n.coordinator().groups.create_topic(&n).await },
            )
            .await?
            .map_err(|_| Failure::coordinator_not_available())?;
    }
    let view = node.view();
    let found = view.image.topic(OFFSETS_TOPIC).and_then(|topic| {
        let partition = partition_of(group, topic.partitions.len());
        let leader = topic.partitions[partition as usize].leader;
        if node.suspects.borrow().contains(&leader) {
            return None;
        }
        node.endpoints().of_node(&view.image, leader)
    });
    found.ok_or_else(Failure::coordinator_not_available)
}

/// Handles a request.
pub async fn handle(node: &Rc<Node>, version: i16, mut request: FindCoordinatorRequest) -> FindCoordinatorResponse {
    if version >= 4 {
        repeats::leave_out(&mut request.coordinator_keys, Clone::clone);
        let mut coordinators = Vec::with_capacity(request.coordinator_keys.len());
        for key in request.coordinator_keys {
            let found = coordinator(node, request.key_type, &key).await;
            let answer = Coordinator::default().with_key(key);
            coordinators.push(match found {
                Ok(at) => answer
                    .with_node_id(at.id.into())
                    .with_host(StrBytes::from_string(at.host))
                    .with_port(i32::from(at.port)),
                Err(failure) => answer
                    .with_node_id((-1).into())
                    .with_port(-1)
                    .with_error_code(failure.code())
                    .with_error_message(failure.text()),
            });
        }
        return FindCoordinatorResponse::default().with_coordinators(coordinators);
    }
    match coordinator(node, request.key_type, &request.key).await {
        Ok(at) => FindCoordinatorResponse::default()
            .with_node_id(at.id.into())
            .with_host(StrBytes::from_string(at.host))
            .with_port(i32::from(at.port)),
        Err(failure) => FindCoordinatorResponse::default()
            .with_node_id((-1).into())
            .with_port(-1)
            .with_error_code(failure.code())
            .with_error_message(if version >= 1 { failure.text() } else { None }),
    }
}
