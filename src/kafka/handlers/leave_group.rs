//! LeaveGroup, versions 0 to 5: one member, or several from version 3 on (KIP-345).

use std::rc::Rc;

use kafka_protocol::{
    ResponseError,
    messages::{
        LeaveGroupRequest, LeaveGroupResponse, leave_group_request::MemberIdentity,
        leave_group_response::MemberResponse,
    },
};

use crate::{kafka::errors::Failure, node::Node};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, version: i16, request: LeaveGroupRequest) -> LeaveGroupResponse {
    if request.group_id.is_empty() {
        return LeaveGroupResponse::default().with_error_code(ResponseError::InvalidGroupId.code());
    }
    let members = if version >= 3 {
        request.members
    } else {
        vec![MemberIdentity::default().with_member_id(request.member_id)]
    };
    let group = request.group_id.to_string();
    let asked = members.clone();
    let results = node
        .router
        .call(node, 0, move |n| async move {
            n.coordinator()
                .groups
                .with(&n, &group, |groups, now| {
                    Ok(asked
                        .iter()
                        .map(|m| groups.leave(&group, &m.member_id, m.group_instance_id.as_deref(), now))
                        .collect::<Vec<_>>())
                })
                .await
        })
        .await;
    let code = |e| Failure::from(e).code();
    let results = match results {
        Ok(Ok(results)) => results,
        Ok(Err(error)) => return LeaveGroupResponse::default().with_error_code(code(error)),
        Err(_) => {
            return LeaveGroupResponse::default().with_error_code(Failure::coordinator_not_available().code());
        }
    };
    if version < 3 {
        let first = results.into_iter().next().and_then(Result::err);
        return LeaveGroupResponse::default().with_error_code(first.map_or(0, code));
    }
    LeaveGroupResponse::default().with_members(
        members
            .into_iter()
            .zip(results)
            .map(|(m, result)| {
                MemberResponse::default()
                    .with_member_id(m.member_id)
                    .with_group_instance_id(m.group_instance_id)
                    .with_error_code(result.err().map_or(0, code))
            })
            .collect(),
    )
}
