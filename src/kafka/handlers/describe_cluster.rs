//! DescribeCluster, versions 0 to 2.

use std::rc::Rc;

use kafka_protocol::{
    ResponseError,
    messages::{DescribeClusterRequest, DescribeClusterResponse, describe_cluster_response::DescribeClusterBroker},
    protocol::StrBytes,
};

use crate::{
    kafka::operations::{self, OF_CLUSTERS},
    node::Node,
};

/// Handles a request.
#[must_use]
pub fn handle(node: &Rc<Node>, version: i16, request: &DescribeClusterRequest) -> DescribeClusterResponse {
    if version >= 1 && request.endpoint_type != 1 {
        return DescribeClusterResponse::default()
            .with_error_code(ResponseError::UnsupportedEndpointType.code())
            .with_error_message(Some(StrBytes::from_static_str(
                "Only broker endpoints are served here.",
            )));
    }
    let endpoints = node.endpoints();
    let view = node.view();
    let active = endpoints.of_cluster(&view.image, |broker| !broker.fenced);
    let brokers = active.into_iter().map(|(e, rack)| {
        DescribeClusterBroker::default()
            .with_broker_id(e.id.into())
            .with_host(StrBytes::from_string(e.host))
            .with_port(i32::from(e.port))
            .with_rack(rack.map(StrBytes::from_string))
    });
    let response = DescribeClusterResponse::default()
        .with_cluster_id(StrBytes::from_string(view.image.cluster_id.clone()))
        .with_controller_id(endpoints.coordinator().id.into())
        .with_cluster_authorized_operations(operations::told(
            request.include_cluster_authorized_operations,
            OF_CLUSTERS,
        ))
        .with_brokers(brokers.collect());
    if version >= 1 {
        response.with_endpoint_type(1)
    } else {
        response
    }
}
