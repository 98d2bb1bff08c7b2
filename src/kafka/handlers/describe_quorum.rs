//! DescribeQuorum, versions 0 to 2: the metadata quorum as this node sees it (KIP-595). Any node answers; how far the logs of the
//! others go only their leader knows, -1 elsewhere.

use std::rc::Rc;

use kafka_protocol::{
    ResponseError,
    messages::{
        DescribeQuorumRequest, DescribeQuorumResponse,
        describe_quorum_response::{Listener, Node as QuorumNode, PartitionData, ReplicaState, TopicData},
    },
    protocol::StrBytes,
};
use uuid::Uuid;

use crate::{kafka::errors::Failure, node::Node};

/// The only topic that is asked for.
const METADATA_TOPIC: &str = "__cluster_metadata";

/// A member as the quorum sees it: id, data folder, log end, silence in ms, address for other nodes.
type Member = (i32, Uuid, i64, Option<i64>, Option<(String, u16)>);

struct Seen {
    leader: i32,
    term: u64,
    committed: u64,
    voters: Vec<Member>,
    observers: Vec<Member>,
}

fn look(node: &Rc<Node>) -> Seen {
    let coordinator = node.coordinator();
    let driver = &coordinator.controller.quorum;
    driver.with(|quorum| {
        let member = |id: i32| {
            let known = quorum.image().member(id);
            let address = known.and_then(|m| m.address.rsplit_once(':'));
            let silence = match id == node.shared.node_id {
                true => Some(0),
                false => driver.silence(id).map(|s| s.as_millis() as i64),
            };
            (
                id,
                known.map_or(Uuid::nil(), |m| Uuid::from_bytes(m.directory)),
                quorum.matched(id).map_or(-1, |index| index as i64 + 1),
                silence,
                address.and_then(|(host, port)| Some((host.to_owned(), port.parse().ok()?))),
            )
        };
        let (voters, learners) = quorum.members();
        Seen {
            leader: quorum.leader().unwrap_or(-1),
            term: quorum.term(),
            committed: quorum.commit_index(),
            voters: voters.into_iter().map(member).collect(),
            observers: learners.into_iter().map(member).collect(),
        }
    })
}

/// Handles a request.
pub async fn handle(node: &Rc<Node>, version: i16, request: DescribeQuorumRequest) -> DescribeQuorumResponse {
    let seen = match node.router.call(node, 0, |n| async move { look(&n) }).await {
        Ok(seen) => seen,
        Err(stopping) => return DescribeQuorumResponse::default().with_error_code(Failure::from(stopping).code()),
    };
    let now = node.now_ms();
    let state = |(id, directory, log_end, silence, _): &Member| {
        let heard = silence.map_or(-1, |ms| now - ms);
        let mut state = ReplicaState::default()
            .with_replica_id((*id).into())
            .with_log_end_offset(*log_end);
        if version >= 1 {
            state = state
                .with_last_fetch_timestamp(heard)
                .with_last_caught_up_timestamp(heard);
        }
        if version >= 2 {
            state = state.with_replica_directory_id(*directory);
        }
        state
    };
    let topics = request.topics.into_iter().map(|topic| {
        let known = topic.topic_name.as_str() == METADATA_TOPIC;
        let partitions = topic.partitions.into_iter().map(|asked| {
            let partition = PartitionData::default().with_partition_index(asked.partition_index);
            if !known || asked.partition_index != 0 {
                return partition.with_error_code(ResponseError::UnknownTopicOrPartition.code());
            }
            partition
                .with_leader_id(seen.leader.into())
                .with_leader_epoch(seen.term as i32)
                .with_high_watermark(seen.committed as i64 + 1)
                .with_current_voters(seen.voters.iter().map(state).collect())
                .with_observers(seen.observers.iter().map(state).collect())
        });
        TopicData::default()
            .with_partitions(partitions.collect())
            .with_topic_name(topic.topic_name)
    });
    let mut response = DescribeQuorumResponse::default().with_topics(topics.collect());
    if version >= 2 {
        let all = seen.voters.iter().chain(&seen.observers);
        response.nodes = all
            .map(|(id, _, _, _, address)| {
                let listeners = address.iter().map(|(host, port)| {
                    Listener::default()
                        .with_name(StrBytes::from_static_str("CLUSTER"))
                        .with_host(StrBytes::from_string(host.clone()))
                        .with_port(*port)
                });
                QuorumNode::default()
                    .with_node_id((*id).into())
                    .with_listeners(listeners.collect())
            })
            .collect();
    }
    response
}
