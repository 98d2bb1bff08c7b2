//! AlterConfigs, versions 0 to 2: replaces all settings of a resource (deprecated by Kafka, still sent). Each resource succeeds or fails by itself.

use std::rc::Rc;

use kafka_protocol::messages::{
    AlterConfigsRequest, AlterConfigsResponse, alter_configs_response::AlterConfigsResourceResponse,
};
use millrace_cluster::controller::configs::{self};

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
pub async fn handle(node: &Rc<Node>, request: AlterConfigsRequest) -> AlterConfigsResponse {
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
            let entries: Vec<(String, Option<String>)> = asked
                .configs
                .iter()
                .map(|c| (c.name.to_string(), c.value.as_ref().map(|v| v.to_string())))
                .collect();
            configs::replace(image, &Known, &resource, &entries).map_err(Failure::from)
        })
        .await;
        responses.push(match changed {
            Ok(()) => response.with_error_message(None),
            Err(failure) => response
                .with_error_code(failure.code())
                .with_error_message(failure.text()),
        });
    }
    AlterConfigsResponse::default().with_responses(responses)
}
