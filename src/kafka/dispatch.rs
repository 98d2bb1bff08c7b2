//! From a decoded request to its handler, and from the handler's response to bytes.

use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use kafka_protocol::messages::{ApiKey, ApiVersionsResponse, RequestKind};
use millrace_engine::sync::Permit;
use millrace_net::kafka::codec::{self, EncodeError, Request};

use super::{
    connection::Peer,
    handlers::{self as h, produce::Prepared},
    intake::Held,
};
use crate::node::Node;

/// What goes back.
pub enum Reply {
    /// A response.
    Bytes(BytesMut),
    /// A response in pieces, to be sent one after the other, with its part of the room for answers.
    Pieces(Vec<Bytes>, Permit),
    /// Nothing is expected (acks=0).
    Nothing,
    /// The connection is to be closed.
    Close,
}

impl Reply {
    /// A response, if it could be encoded; else nobody can be told.
    pub fn of(encoded: Result<Self, EncodeError>) -> Self {
        encoded.unwrap_or_else(|error| {
            tracing::error!(%error, "its connection is closed");
            Self::Close
        })
    }

    /// Bytes to be sent.
    #[must_use]
    pub fn size(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Pieces(pieces, _) => pieces.iter().map(Bytes::len).sum(),
            Self::Nothing | Self::Close => 0,
        }
    }
}

/// The answer to an ApiVersions request newer than ours: version 0 of the response with error 35 and the ranges.
#[must_use]
pub fn unsupported_api_versions(correlation_id: i32) -> Reply {
    let answer = h::api_versions::unsupported();
    Reply::of(codec::encode(ApiKey::ApiVersions, &answer, 0, correlation_id).map(Reply::Bytes))
}

/// Handles a Produce request whose batches were checked. It alone is worked on beside others of its connection, in a task that would have
/// to be as large as the largest handler if they all were one.
pub async fn produce(node: &Rc<Node>, version: i16, id: i32, prepared: Prepared) -> Reply {
    match h::produce::append(node, prepared).await {
        h::produce::Outcome::Answer(response) => {
            Reply::of(codec::encode(ApiKey::Produce, &response, version, id).map(Reply::Bytes))
        }
        h::produce::Outcome::Silent => Reply::Nothing,
        h::produce::Outcome::Close => Reply::Close,
    }
}

/// Handles one request of any other API. It and what is `held` for it are gone before it waits for its client's sake.
pub async fn handle(node: &Rc<Node>, request: Request, held: Held, peer: &Peer) -> Reply {
    let (api, version, id) = (request.api, request.version, request.correlation_id);
    macro_rules! answer {
        ($response:expr) => {
            Reply::of(codec::encode(api, &$response, version, id).map(Reply::Bytes))
        };
    }
    // It is a part of the request's memory.
    let client_id = request.client_id.filter(|_| api == ApiKey::JoinGroup);
    match request.body {
        RequestKind::Fetch(r) => h::fetch::handle(node, version, id, peer, held, r).await,
        RequestKind::ListOffsets(r) => answer!(h::list_offsets::handle(node, version, r).await),
        RequestKind::Metadata(r) => answer!(h::metadata::handle(node, version, peer, r).await),
        RequestKind::OffsetCommit(r) => answer!(h::offset_commit::handle(node, version, r).await),
        RequestKind::OffsetFetch(r) => answer!(h::offset_fetch::handle(node, version, r).await),
        RequestKind::FindCoordinator(r) => answer!(h::find_coordinator::handle(node, version, r).await),
        RequestKind::JoinGroup(r) => answer!(h::join_group::handle(node, version, client_id, peer, held, r).await),
        RequestKind::Heartbeat(r) => answer!(h::heartbeat::handle(node, r).await),
        RequestKind::LeaveGroup(r) => answer!(h::leave_group::handle(node, version, r).await),
        RequestKind::SyncGroup(r) => answer!(h::sync_group::handle(node, peer, held, r).await),
        RequestKind::DescribeGroups(r) => answer!(h::describe_groups::handle(node, version, r).await),
        RequestKind::ListGroups(r) => answer!(h::list_groups::handle(node, version, r).await),
        RequestKind::ApiVersions(r) => answer!(h::api_versions::handle(node, version, &r)),
        RequestKind::CreateTopics(r) => answer!(h::create_topics::handle(node, version, r).await),
        RequestKind::DeleteTopics(r) => answer!(h::delete_topics::handle(node, version, r).await),
        RequestKind::DeleteRecords(r) => answer!(h::delete_records::handle(node, r).await),
        RequestKind::InitProducerId(r) => answer!(h::init_producer_id::handle(node, r).await),
        RequestKind::OffsetForLeaderEpoch(r) => answer!(h::offset_for_leader_epoch::handle(node, r).await),
        RequestKind::DescribeAcls(_) => answer!(h::describe_acls::handle()),
        RequestKind::DescribeConfigs(r) => answer!(h::describe_configs::handle(node, version, &r)),
        RequestKind::AlterConfigs(r) => answer!(h::alter_configs::handle(node, r).await),
        RequestKind::IncrementalAlterConfigs(r) => answer!(h::incremental_alter_configs::handle(node, r).await),
        RequestKind::AlterReplicaLogDirs(r) => answer!(h::alter_replica_log_dirs::handle(node, r).await),
        RequestKind::DescribeLogDirs(r) => answer!(h::describe_log_dirs::handle(node, version, peer, r).await),
        RequestKind::CreatePartitions(r) => answer!(h::create_partitions::handle(node, r).await),
        RequestKind::DeleteGroups(r) => answer!(h::delete_groups::handle(node, r).await),
        RequestKind::OffsetDelete(r) => answer!(h::offset_delete::handle(node, r).await),
        RequestKind::DescribeCluster(r) => answer!(h::describe_cluster::handle(node, version, &r)),
        RequestKind::DescribeProducers(r) => answer!(h::describe_producers::handle(node, r).await),
        RequestKind::ElectLeaders(r) => answer!(h::elect_leaders::handle(node, version, r).await),
        RequestKind::DescribeQuorum(r) => answer!(h::describe_quorum::handle(node, version, r).await),
        RequestKind::AlterPartitionReassignments(r) => {
            answer!(h::alter_partition_reassignments::handle(node, version, r).await)
        }
        RequestKind::ListPartitionReassignments(r) => answer!(h::list_partition_reassignments::handle(node, &r)),
        RequestKind::UpdateFeatures(r) => answer!(h::update_features::handle(node, version, r).await),
        RequestKind::UnregisterBroker(r) => answer!(h::unregister_broker::handle(node, r).await),
        RequestKind::AddRaftVoter(r) => answer!(h::add_raft_voter::handle(node, r).await),
        RequestKind::RemoveRaftVoter(r) => answer!(h::remove_raft_voter::handle(node, r).await),
        RequestKind::ListConfigResources(r) => answer!(h::list_config_resources::handle(node, version, &r)),
        RequestKind::DescribeTopicPartitions(r) => answer!(h::describe_topic_partitions::handle(node, &r)),
        other => {
            // The version table lists what is served; what it lists has an arm above.
            tracing::error!(?other, "a listed API has no handler");
            answer!(ApiVersionsResponse::default())
        }
    }
}
