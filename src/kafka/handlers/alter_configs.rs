//! AlterConfigs, versions 0 to 2: replaces all settings of a resource (deprecated by Kafka, still sent). Each resource succeeds or fails by itself.

use std::rc::Rc;

use kafka_protocol::messages::{
    AlterConfigsRequest, AlterConfigsResponse, alter_configs_response::AlterConfigsResourceResponse,
};
use millrace_cluster::controller::configs::{self};

use crate::{
    config::Known,
    kafka::{configs::resource, errors::Failure},
    node::Node,
};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, request: AlterConfigsRequest) -> AlterConfigsResponse {
    let mut responses = Vec::with_capacity(request.resources.len());
    for asked in request.resources {
        let response = AlterConfigsResourceResponse::default()
            .with_resource_type(asked.resource_type)
            .with_resource_name(asked.resource_name.clone());
        let validate_only = request.validate_only;
        let changed = node
            .router
            .call(node, 0, move |n| async move {
                n.coordinator()
                    .controller
                    .change(&n, |image| {
                        let decide = || {
                            let resource = resource(asked.resource_type, &asked.resource_name, n.shared.node_id)?;
                            let entries: Vec<(String, Option<String>)> = asked
                                .configs
                                .iter()
                                .map(|c| (c.name.to_string(), c.value.as_ref().map(|v| v.to_string())))
                                .collect();
                            configs::replace(image, &Known, &resource, &entries).map_err(Failure::from)
                        };
                        match decide() {
                            Ok(_) if validate_only => (Vec::new(), Ok(())),
                            Ok(records) => (records, Ok(())),
                            Err(failure) => (Vec::new(), Err(failure)),
                        }
                    })
                    .await
                    .map_err(Failure::from)
                    .and_then(|r| r)
            })
            .await
            .map_err(Failure::from)
            .and_then(|r| r);
        responses.push(match changed {
            Ok(()) => response,
            Err(failure) => response
                .with_error_code(failure.code())
                .with_error_message(failure.text()),
        });
    }
    AlterConfigsResponse::default().with_responses(responses)
}
