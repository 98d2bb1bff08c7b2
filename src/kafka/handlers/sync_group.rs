//! SyncGroup, versions 0 to 5: the leader hands assignments out, the others collect theirs.

use std::{rc::Rc, sync::Arc};

use bytes::Bytes;
use kafka_protocol::{
    messages::{SyncGroupRequest, SyncGroupResponse},
    protocol::StrBytes,
};
use millrace_cluster::group::coordinator::Caller;

use crate::{
    kafka::{connection::Peer, errors::Failure, intake::Held},
    node::Node,
};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, peer: &Peer, held: Held, request: SyncGroupRequest) -> SyncGroupResponse {
    let hangup = Arc::clone(&peer.hangup);
    let text = |s: &StrBytes| s.to_string();
    let (group, member_id, generation) = (
        request.group_id.to_string(),
        text(&request.member_id),
        request.generation_id,
    );
    let instance_id = request.group_instance_id.as_ref().map(text);
    let protocol = (
        request.protocol_type.as_ref().map(text),
        request.protocol_name.as_ref().map(text),
    );
    // What is kept of them keeps no more than that.
    let assignments = (request.assignments.iter())
        .map(|a| (text(&a.member_id), Bytes::copy_from_slice(&a.assignment)))
        .collect();
    drop((request, held));
    let synced = node
        .router
        .call(node, 0, move |n| async move {
            let caller = Caller {
                member_id: &member_id,
                instance_id: instance_id.as_deref(),
                generation,
            };
            let protocol = (protocol.0.as_deref(), protocol.1.as_deref());
            n.coordinator()
                .groups
                .sync(&n, &group, caller, protocol, assignments, &hangup)
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
