//! Heartbeat, versions 0 to 4.

use std::rc::Rc;

use kafka_protocol::messages::{HeartbeatRequest, HeartbeatResponse};
use millrace_cluster::group::coordinator::Caller;

use crate::{kafka::errors::Failure, node::Node};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, request: HeartbeatRequest) -> HeartbeatResponse {
    let result = node
        .router
        .call(node, 0, move |n| async move {
            let caller = Caller {
                member_id: &request.member_id,
                instance_id: request.group_instance_id.as_deref(),
                generation: request.generation_id,
            };
            n.coordinator()
                .groups
                .with(&n, &request.group_id, |groups, now| {
                    groups.heartbeat(&request.group_id, caller, now)
                })
                .await
        })
        .await;
    let code = match result {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => Failure::from(error).code(),
        Err(_) => Failure::coordinator_not_available().code(),
    };
    HeartbeatResponse::default().with_error_code(code)
}
