//! SyncGroup, versions 0 to 5: the leader hands assignments out, the others collect theirs.

use std::{rc::Rc, sync::Arc};

use kafka_protocol::{
    messages::{SyncGroupRequest, SyncGroupResponse},
    protocol::StrBytes,
};
use millrace_cluster::group::coordinator::Caller;

use crate::{
    kafka::{connection::Peer, errors::Failure},
    node::Node,
};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, peer: &Peer, request: SyncGroupRequest) -> SyncGroupResponse {
    let hangup = Arc::clone(&peer.hangup);
    let synced = node
        .router
        .call(node, 0, move |n| async move {
            let caller = Caller {
                member_id: &request.member_id,
                instance_id: request.group_instance_id.as_deref(),
                generation: request.generation_id,
            };
            let protocol = (request.protocol_type.as_deref(), request.protocol_name.as_deref());
            let assignments = request
                .assignments
                .iter()
                .map(|a| (a.member_id.to_string(), a.assignment.clone()))
                .collect();
            n.coordinator()
                .groups
                .sync(&n, &request.group_id, caller, protocol, assignments, &hangup)
                .await
        })
        .await;
    match synced {
        Ok(Ok(synced)) => SyncGroupResponse::default()
            .with_protocol_type(synced.protocol_type.map(StrBytes::from_string))
            .with_protocol_name(synced.protocol.map(StrBytes::from_string))
            .with_assignment(synced.assignment),
        Ok(Err(error)) => SyncGroupResponse::default().with_error_code(Failure::from(error).code()),
        Err(_) => SyncGroupResponse::default().with_error_code(Failure::coordinator_not_available().code()),
    }
}
