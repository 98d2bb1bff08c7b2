//! OffsetCommit, versions 2 to 10: durable before it is answered. Each partition is answered by itself. From 10 on
//! topics are named by id (`net/kafka/newer.rs`).

use std::rc::Rc;

use kafka_protocol::{
    ResponseError,
    messages::{
        OffsetCommitRequest, OffsetCommitResponse,
        offset_commit_response::{OffsetCommitResponsePartition, OffsetCommitResponseTopic},
    },
};
use millrace_cluster::group::{coordinator::Caller, offsets::Committed};
use millrace_net::kafka::newer;

use crate::{coordinator::groups::Commit, kafka::errors::Failure, node::Node};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, version: i16, request: OffsetCommitRequest) -> OffsetCommitResponse {
    let asked = request.clone();
    let result = node
        .router
        .call(node, 0, move |n| async move { commit(&n, version, asked).await })
        .await;
    let codes = match result.map_err(Failure::from).and_then(|r| r) {
        Ok(codes) => codes,
        Err(mut failure) => {
            // Older clients do not know that a group may not be there.
            if failure.error == ResponseError::GroupIdNotFound && version < 9 {
                failure = ResponseError::IllegalGeneration.into();
            }
            let count = request.topics.iter().map(|t| t.partitions.len()).sum();
            vec![failure.code(); count]
        }
    };
    let mut codes = codes.into_iter();
    let topics = request
        .topics
        .iter()
        .map(|topic| {
            OffsetCommitResponseTopic::default()
                .with_name(topic.name.clone())
                .with_partitions(
                    topic
                        .partitions
                        .iter()
                        .map(|p| {
                            OffsetCommitResponsePartition::default()
                                .with_partition_index(p.partition_index)
                                .with_error_code(codes.next().unwrap_or(0))
                        })
                        .collect(),
                )
        })
        .collect();
    OffsetCommitResponse::default().with_topics(topics)
}

/// Codes of all partitions in the order of the request.
async fn commit(node: &Rc<Node>, version: i16, request: OffsetCommitRequest) -> Result<Vec<i16>, Failure> {
    let caller = Caller {
        member_id: &request.member_id,
        instance_id: request.group_instance_id.as_deref(),
        generation: request.generation_id_or_member_epoch,
    };
    let coordinator = node.coordinator();
    let now = node.now_ms();
    let view = node.view();
    let (codes, accepted) = coordinator
        .groups
        .with(node, &request.group_id, |groups, now_groups| {
            groups.check_commit(&request.group_id, caller, now_groups)?;
            let mut codes = Vec::new();
            let mut accepted = Vec::new();
            for topic in &request.topics {
                let (image, unknown) = if version >= 10 {
                    let id = newer::name_as_id(&topic.name);
                    let image = id.and_then(|id| view.image.topic_by_id(&id));
                    (image, ResponseError::UnknownTopicId)
                } else {
                    (view.image.topic(&topic.name), ResponseError::UnknownTopicOrPartition)
                };
                for p in &topic.partitions {
                    let metadata = p.committed_metadata.as_ref().map_or("", |m| m.as_str());
                    let known = image.filter(|t| (p.partition_index as usize) < t.partitions.len());
                    codes.push(if image.is_none() {
                        unknown.code()
                    } else if known.is_none() {
                        ResponseError::UnknownTopicOrPartition.code()
                    } else if let Err(error) = groups.check_metadata(metadata) {
                        Failure::from(error).code()
                    } else {
                        accepted.push((
                            image.map(|t| t.name.clone()).unwrap_or_default(),
                            p.partition_index,
                            Committed {
                                offset: p.committed_offset,
                                leader_epoch: p.committed_leader_epoch,
                                metadata: metadata.to_owned(),
                                commit_ms: now,
                            },
                        ));
                        0
                    });
                }
            }
            Ok((codes, accepted))
        })
        .await?;
    let groups = &coordinator.groups;
    let offsets = Commit {
        offsets: accepted,
        found_in: view,
    };
    groups.commit(node, &request.group_id, caller, offsets).await?;
    Ok(codes)
}
