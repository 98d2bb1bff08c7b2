//! OffsetForLeaderEpoch, versions 2 to 4 (KIP-320): where an epoch ended, for consumers that check for truncation.

use std::rc::Rc;

use kafka_protocol::messages::{
    OffsetForLeaderEpochRequest, OffsetForLeaderEpochResponse,
    offset_for_leader_epoch_response::{EpochEndOffset, OffsetForLeaderTopicResult},
};
use uuid::Uuid;

use crate::{
    kafka::{
        errors::Failure,
        topics::{check_epoch, find},
    },
    node::Node,
    router::scatter,
};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, request: OffsetForLeaderEpochRequest) -> OffsetForLeaderEpochResponse {
    let view = node.view();
    let mut work = Vec::new();
    let mut places = Vec::new();
    let mut topics = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        let image = find(&view, &topic.topic, Uuid::nil(), false);
        let mut partitions = Vec::with_capacity(topic.partitions.len());
        for asked in topic.partitions {
            let mut answer = EpochEndOffset::default()
                .with_partition(asked.partition)
                .with_leader_epoch(-1)
                .with_end_offset(-1);
            let resolve = || {
                let image = image.as_ref().map_err(Clone::clone)?;
                let resolved = Node::resolve(&view, image, asked.partition)?;
                check_epoch(asked.current_leader_epoch, resolved.leader_epoch)?;
                Ok((
                    resolved.shard,
                    (resolved.key, asked.leader_epoch, resolved.leader_epoch),
                ))
            };
            match resolve() {
                Ok(item) => {
                    places.push((topics.len(), partitions.len()));
                    work.push(item);
                }
                Err(failure) => {
                    let failure: Failure = failure;
                    answer.error_code = failure.code();
                }
            }
            partitions.push(answer);
        }
        topics.push(
            OffsetForLeaderTopicResult::default()
                .with_topic(topic.topic)
                .with_partitions(partitions),
        );
    }
    let results = scatter(node, work, |n, list| async move {
        list.into_iter()
            .map(|(key, epoch, current)| {
                let partition = n.engine.partition(&key).ok_or_else(Failure::unknown_partition)?;
                let log_end = partition.status().high_watermark;
                // The current epoch may not have written anything yet; it ends at the log's end all the same.
                if epoch == current {
                    return Ok(Some((epoch, log_end)));
                }
                Ok(partition.with_state(|s| s.epochs.end_offset(epoch, log_end)))
            })
            .collect::<Vec<Result<_, Failure>>>()
    })
    .await;
    for ((topic, partition), result) in places.into_iter().zip(results) {
        let slot = &mut topics[topic].partitions[partition];
        match result.map_err(Failure::from).and_then(|r| r) {
            Ok(Some((epoch, end))) => {
                slot.leader_epoch = epoch;
                slot.end_offset = end;
            }
            Ok(None) => {}
            Err(failure) => slot.error_code = failure.code(),
        }
    }
    OffsetForLeaderEpochResponse::default().with_topics(topics)
}
