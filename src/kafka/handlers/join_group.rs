//! JoinGroup, versions 0 to 9: the classic protocol, static membership (KIP-345), required member ids (KIP-394).

use std::{rc::Rc, sync::Arc};

use bytes::Bytes;
use kafka_protocol::{
    messages::{JoinGroupRequest, JoinGroupResponse, join_group_response::JoinGroupResponseMember},
    protocol::StrBytes,
};
use millrace_cluster::group::coordinator::{Join, Joined};
use uuid::Uuid;

use crate::{
    kafka::{connection::Peer, errors::Failure, intake::Held},
    node::Node,
};

/// Bytes of a member id that its client chooses.
const PREFIX_MAX: usize = 1_000;

/// Handles a request.
pub async fn handle(
    node: &Rc<Node>,
    version: i16,
    client_id: Option<StrBytes>,
    peer: &Peer,
    held: Held,
    request: JoinGroupRequest,
) -> JoinGroupResponse {
    let member_id = request.member_id.to_string();
    let client_id = client_id.map_or_else(String::new, |c| c.to_string());
    let prefix = request
        .group_instance_id
        .as_ref()
        .map_or(client_id.as_str(), |i| i.as_str());
    let prefix = &prefix[..prefix.floor_char_boundary(PREFIX_MAX)];
    let join = Join {
        group: request.group_id.to_string(),
        member_id: member_id.clone(),
        instance_id: request.group_instance_id.as_ref().map(|i| i.to_string()),
        client_id: client_id.clone(),
        client_host: format!("/{}", peer.address.ip()),
        session_timeout_ms: request.session_timeout_ms,
        // Version 0 has no rebalance timeout of its own.
        rebalance_timeout_ms: if version == 0 {
            request.session_timeout_ms
        } else {
            request.rebalance_timeout_ms
        },
        protocol_type: request.protocol_type.to_string(),
        protocols: request
            .protocols
            .iter()
            // What is kept of it keeps no more than that.
            .map(|p| (p.name.to_string(), Bytes::copy_from_slice(&p.metadata)))
            .collect(),
        require_member_id: version >= 4,
        knows_skip_assignment: version >= 9,
        new_member_id: format!("{prefix}-{}", Uuid::new_v4()),
    };
    drop((request, held));
    let hangup = Arc::clone(&peer.hangup);
    let joined = node
        .router
        .call(node, 0, move |n| async move {
            n.coordinator().groups.join(&n, join, &hangup).await
        })
        .await;
    match joined {
        Ok(Ok(joined)) => answer(version, joined),
        Ok(Err((error, member_id))) => refuse(version, Failure::from(error).code(), member_id),
        Err(_) => refuse(version, Failure::coordinator_not_available().code(), member_id),
    }
}

fn refuse(version: i16, code: i16, member_id: String) -> JoinGroupResponse {
    JoinGroupResponse::default()
        .with_error_code(code)
        .with_generation_id(-1)
        .with_protocol_name(if version >= 7 { None } else { Some(StrBytes::default()) })
        .with_member_id(StrBytes::from_string(member_id))
}

fn answer(version: i16, joined: Joined) -> JoinGroupResponse {
    let members = joined
        .members
        .into_iter()
        .map(|(id, instance, metadata)| {
            let mut member = JoinGroupResponseMember::default()
                .with_member_id(StrBytes::from_string(id))
                .with_metadata(metadata);
            if version >= 5 {
                member.group_instance_id = instance.map(StrBytes::from_string);
            }
            member
        })
        .collect();
    let mut response = JoinGroupResponse::default()
        .with_generation_id(joined.generation)
        .with_protocol_name(Some(StrBytes::from_string(joined.protocol.unwrap_or_default())))
        .with_leader(StrBytes::from_string(joined.leader))
        .with_member_id(StrBytes::from_string(joined.member_id))
        .with_members(members);
    if version >= 7 {
        response.protocol_type = joined.protocol_type.map(StrBytes::from_string);
    }
    if version >= 9 {
        response.skip_assignment = joined.skip_assignment;
    }
    response
}
