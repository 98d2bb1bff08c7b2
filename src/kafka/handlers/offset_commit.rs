//! OffsetCommit, versions 2 to 9: durable before it is answered. Each partition is answered by itself.

use std::rc::Rc;

use kafka_protocol::{
    ResponseError,
    messages::{
        OffsetCommitRequest, OffsetCommitResponse,
        offset_commit_response::{OffsetCommitResponsePartition, OffsetCommitResponseTopic},
    },
};
use millrace_cluster::group::{coordinator::Caller, offsets::Committed};

use crate::{kafka::errors::Failure, node::Node};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, request: OffsetCommitRequest) -> OffsetCommitResponse {
    let asked = request.clone();
    let result = node
        .router
        .call(node, 0, move |n| async move { commit(&n, asked).await })
        .await;
    let codes = match result.map_err(Failure::from).and_then(|r| r) {
        Ok(codes) => codes,
        Err(failure) => {
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
async fn commit(node: &Rc<Node>, request: OffsetCommitRequest) -> Result<Vec<i16>, Failure> {
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
        .with(node, |groups, now_groups| {
            groups.check_commit(&request.group_id, caller, now_groups)?;
            let mut codes = Vec::new();
            let mut accepted = Vec::new();
            for topic in &request.topics {
                let image = view.image.topic(&topic.name);
                for p in &topic.partitions {
                    let metadata = p.committed_metadata.as_ref().map_or("", |m| m.as_str());
                    let known = image.is_some_and(|t| (p.partition_index as usize) < t.partitions.len());
                    codes.push(if !known {
                        ResponseError::UnknownTopicOrPartition.code()
                    } else if let Err(error) = groups.check_metadata(metadata) {
                        Failure::from(error).code()
                    } else {
                        accepted.push((
                            topic.name.to_string(),
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
    coordinator.groups.commit(node, &request.group_id, accepted).await?;
    Ok(codes)
}
