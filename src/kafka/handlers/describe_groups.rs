//! DescribeGroups, versions 0 to 6; an unknown group is `Dead`, from version 6 on with GROUP_ID_NOT_FOUND (KIP-1043).

use std::rc::Rc;

use bytes::Bytes;
use kafka_protocol::{
    ResponseError,
    messages::{
        DescribeGroupsRequest, DescribeGroupsResponse,
        describe_groups_response::{DescribedGroup, DescribedGroupMember},
    },
    protocol::StrBytes,
};
use millrace_cluster::group::classic::{Group, GroupState};

use crate::{
    kafka::{
        errors::Failure,
        operations::{self, OF_GROUPS},
        repeats,
    },
    node::Node,
};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, version: i16, mut request: DescribeGroupsRequest) -> DescribeGroupsResponse {
    repeats::leave_out(&mut request.groups, Clone::clone);
    let asked = request.groups.clone();
    let groups = node
        .router
        .call(node, 0, move |n| async move {
            let mut found = Vec::with_capacity(asked.len());
            for id in asked {
                let coordinator = n.coordinator();
                let look = coordinator
                    .groups
                    .with(&n, &id, |groups, _| Ok(groups.group(&id).cloned()));
                found.push(look.await.map_err(Failure::from));
            }
            found
        })
        .await;
    let mut found = groups.unwrap_or_default().into_iter();
    let described = request
        .groups
        .into_iter()
        .map(|id| {
            let mut out = DescribedGroup::default().with_group_id(id.clone());
            if version >= 3 {
                out.authorized_operations = operations::told(request.include_authorized_operations, OF_GROUPS);
            }
            let unavailable = || Err(Failure::coordinator_not_available());
            match found.next().unwrap_or_else(unavailable) {
                Err(failure) => out.with_error_code(failure.code()),
                Ok(Some(group)) => describe(out, &group, version),
                Ok(None) => {
                    out.group_state = StrBytes::from_static_str("Dead");
                    if version >= 6 {
                        out.error_code = ResponseError::GroupIdNotFound.code();
                        out.error_message = Some(StrBytes::from_string(format!("Group {} not found.", id.as_str())));
                    }
                    out
                }
            }
        })
        .collect();
    DescribeGroupsResponse::default().with_groups(described)
}

fn describe(out: DescribedGroup, group: &Group, version: i16) -> DescribedGroup {
    let text = |s: &str| StrBytes::from_string(s.to_owned());
    let stable = group.state == GroupState::Stable;
    let protocol = group.protocol.clone().filter(|_| stable).unwrap_or_default();
    let members = group
        .members
        .values()
        .map(|m| {
            let mut member = DescribedGroupMember::default()
                .with_member_id(text(&m.id))
                .with_client_id(text(&m.client_id))
                .with_client_host(text(&m.client_host))
                .with_member_metadata(if stable { m.metadata(&protocol) } else { Bytes::new() })
                // While the group rebalances, that of the generation before.
                .with_member_assignment(m.assignment.clone());
            if version >= 4 {
                member.group_instance_id = m.instance_id.as_deref().map(text);
            }
            member
        })
        .collect();
    out.with_group_state(StrBytes::from_static_str(group.state.name()))
        .with_protocol_type(text(group.protocol_type.as_deref().unwrap_or("")))
        .with_protocol_data(text(&protocol))
        .with_members(members)
}
