//! OffsetForLeaderEpoch, versions 2 to 4 (KIP-320): where an epoch ended, for consumers that check for truncation.

use std::rc::Rc;

use kafka_protocol::messages::{
    OffsetForLeaderEpochRequest, OffsetForLeaderEpochResponse,
    offset_for_leader_epoch_response::{EpochEndOffset, OffsetForLeaderTopicResult},
};
use millrace_engine::log::EpochCache;
use uuid::Uuid;

use crate::{
    kafka::{
        errors::Failure,
        topics::{check_epoch, find},
    },
    node::Node,
    router::scatter,
};

/// Where `epoch` ends in the log of the leader under `current`: the largest epoch not above it that the log has, and its end
/// offset, as `LeaderEpochFileCache.endOffsetFor` of Kafka. The latest epoch ends at the log end offset, never at the high watermark:
/// that may be a lower bound, and a consumer takes an end before its position for a truncation.
fn end_of_epoch(epochs: &EpochCache, epoch: i32, current: i32, log_end: i64) -> Option<(i32, i64)> {
    // The current epoch may not have written anything yet.
    if epoch == current {
        return Some((epoch, log_end));
    }
    if epoch < 0 || epoch > current {
        return None;
    }
    // Of an epoch whose records were all deleted only the end is known: where the log begins now, or before.
    epochs
        .end_offset(epoch, log_end)
        .or_else(|| epochs.first().map(|first| (epoch, first.start)))
}

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
                let slot = n.replication.slot(&key).ok_or_else(Failure::not_leader)?;
                slot.check_leads(current)?;
                Ok(slot
                    .partition
                    .with_state(|s| end_of_epoch(&s.epochs, epoch, current, s.log_end())))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_end_where_consumers_may_trust_them() {
        let mut epochs = EpochCache::default();
        epochs.note(2, 10);
        epochs.note(5, 30);
        for (asked, end) in [
            (-1, None),
            (1, Some((1, 10))),
            (2, Some((2, 30))),
            (4, Some((2, 30))),
            (5, Some((5, 42))),
            (6, Some((5, 42))),
            (7, Some((7, 42))),
            (8, None),
        ] {
            assert_eq!(end_of_epoch(&epochs, asked, 7, 42), end, "epoch {asked}");
        }
        assert_eq!(end_of_epoch(&EpochCache::default(), 3, 7, 0), None);
    }
}
