//! ListConfigResources, versions 0 to 1 (KIP-1142): version 0 asks for client metrics, of which there are none.

use std::rc::Rc;

use kafka_protocol::{
    messages::{
        ListConfigResourcesRequest, ListConfigResourcesResponse, list_config_resources_response::ConfigResource,
    },
    protocol::StrBytes,
};

use crate::{
    kafka::configs::{BROKER, BROKER_LOGGER, TOPIC},
    node::Node,
};

/// Handles a request.
#[must_use]
pub fn handle(node: &Rc<Node>, version: i16, request: &ListConfigResourcesRequest) -> ListConfigResourcesResponse {
    let wanted = |kind: i8| request.resource_types.is_empty() || request.resource_types.contains(&kind);
    let mut resources = Vec::new();
    if version >= 1 {
        let mut add = |kind: i8, name: String| {
            resources.push(
                ConfigResource::default()
                    .with_resource_type(kind)
                    .with_resource_name(StrBytes::from_string(name)),
            );
        };
        if wanted(TOPIC) {
            node.view().image.topics().for_each(|t| add(TOPIC, t.name.clone()));
        }
        for kind in [BROKER, BROKER_LOGGER] {
            if wanted(kind) {
                add(kind, node.shared.node_id.to_string());
            }
        }
    }
    ListConfigResourcesResponse::default().with_config_resources(resources)
}
