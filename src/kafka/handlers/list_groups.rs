//! ListGroups, versions 0 to 5, with filters by state (KIP-518) and type (KIP-848: all are `classic`).

use std::{collections::HashSet, rc::Rc};

use kafka_protocol::{
    messages::{ListGroupsRequest, ListGroupsResponse, list_groups_response::ListedGroup},
    protocol::StrBytes,
};

use crate::{kafka::errors::Failure, node::Node};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, version: i16, request: ListGroupsRequest) -> ListGroupsResponse {
    let groups = node
        .router
        .call(node, 0, |n| async move {
            n.coordinator().groups.look(|groups| {
                let listed = groups.groups();
                listed
                    .map(|g| (g.id.clone(), g.protocol_type.clone(), g.state.name()))
                    .collect::<Vec<_>>()
            })
        })
        .await;
    let Ok(mut groups) = groups else {
        return ListGroupsResponse::default().with_error_code(Failure::coordinator_not_available().code());
    };
    groups.sort_unstable();
    let lower = |filter: &[StrBytes]| filter.iter().map(|f| f.to_ascii_lowercase()).collect::<HashSet<_>>();
    let (states, types) = (lower(&request.states_filter), lower(&request.types_filter));
    let is_listed = |filter: &HashSet<String>, value: &str| filter.is_empty() || filter.contains(value);
    let groups = groups
        .into_iter()
        .filter(|(_, _, state)| is_listed(&states, &state.to_ascii_lowercase()) && is_listed(&types, "classic"))
        .map(|(id, protocol_type, state)| {
            let mut group = ListedGroup::default()
                .with_group_id(StrBytes::from_string(id).into())
                .with_protocol_type(StrBytes::from_string(protocol_type.unwrap_or_default()));
            if version >= 4 {
                group.group_state = StrBytes::from_static_str(state);
            }
            if version >= 5 {
                group.group_type = StrBytes::from_static_str("classic");
            }
            group
        })
        .collect();
    ListGroupsResponse::default().with_groups(groups)
}
