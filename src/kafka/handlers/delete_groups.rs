//! DeleteGroups, versions 0 to 2: groups without members, with their offsets.

use std::rc::Rc;

use kafka_protocol::messages::{
    DeleteGroupsRequest, DeleteGroupsResponse, delete_groups_response::DeletableGroupResult,
};

use crate::{
    kafka::{
        errors::Failure,
        repeats::{Named, Repeats},
    },
    node::Node,
};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, request: DeleteGroupsRequest) -> DeleteGroupsResponse {
    let mut results = Vec::with_capacity(request.groups_names.len());
    let mut repeats = Repeats::among(request.groups_names.iter().cloned());
    for id in request.groups_names {
        if repeats.next(&id) == Named::Again {
            continue;
        }
        let group = id.to_string();
        let deleted = node
            .router
            .call(node, 0, move |n| async move {
                n.coordinator()
                    .groups
                    .remove(&n, &group, |groups| groups.delete(&group))
                    .await
            })
            .await;
        let code = match deleted {
            Ok(Ok(())) => 0,
            Ok(Err(error)) => Failure::from(error).code(),
            Err(_) => Failure::coordinator_not_available().code(),
        };
        results.push(DeletableGroupResult::default().with_group_id(id).with_error_code(code));
    }
    DeleteGroupsResponse::default().with_results(results)
}
