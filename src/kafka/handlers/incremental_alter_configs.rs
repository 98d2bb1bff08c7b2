//! IncrementalAlterConfigs, versions 0 to 1 (KIP-339): set, delete, append, subtract. Each resource succeeds or fails by itself.

use std::rc::Rc;

use kafka_protocol::{
    ResponseError,
    messages::{
        IncrementalAlterConfigsRequest, IncrementalAlterConfigsResponse,
        incremental_alter_configs_response::AlterConfigsResourceResponse,
    },
};
use millrace_cluster::controller::configs::{self, Operation};

use crate::{
    config::Known,
    coordinator::controller::propose,
    kafka::{
        configs::{refuse_twice, resource},
        errors::Failure,
        repeats::{Named, Repeats},
    },
    node::Node,
};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, request: IncrementalAlterConfigsRequest) -> IncrementalAlterConfigsResponse {
    let mut responses = Vec::with_capacity(request.resources.len());
    let named = (request.resources.iter()).map(|r| (r.resource_type, r.resource_name.clone()));
    let mut repeats = Repeats::among(named);
    for asked in request.resources {
        let response = AlterConfigsResourceResponse::default()
            .with_resource_type(asked.resource_type)
            .with_resource_name(asked.resource_name.clone());
        if repeats.next(&(asked.resource_type, asked.resource_name.clone())) != Named::Once {
            let failure = refuse_twice();
            responses.push(
                response
                    .with_error_code(failure.code())
                    .with_error_message(failure.text()),
            );
            continue;
        }
        let changed = propose(node, request.validate_only, move |n, image| {
            let resource = resource(asked.resource_type, &asked.resource_name, n, true)?;
            let mut changes = Vec::new();
            for c in &asked.configs {
                let operation = match c.config_operation {
                    0 => Operation::Set,
                    1 => Operation::Delete,
                    2 => Operation::Append,
                    3 => Operation::Subtract,
                    other => {
                        return Err(Failure::new(
                            ResponseError::InvalidRequest,
                            format!("Unknown config operation {other}"),
                        ));
                    }
                };
                changes.push((c.name.to_string(), operation, c.value.as_ref().map(|v| v.to_string())));
            }
            configs::alter_incrementally(image, &Known, &resource, &changes).map_err(Failure::from)
        })
        .await;
        responses.push(match changed {
            Ok(()) => response.with_error_message(None),
            Err(failure) => response
                .with_error_code(failure.code())
                .with_error_message(failure.text()),
        });
    }
    IncrementalAlterConfigsResponse::default().with_responses(responses)
}
