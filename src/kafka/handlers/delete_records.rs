//! DeleteRecords, versions 0 to 2 (KIP-107): moves the log start; -1 means the high watermark. It is answered once every replica in
//! sync has moved its own, durably.

use std::{
    rc::Rc,
    time::{Duration, Instant},
};

use kafka_protocol::{
    ResponseError,
    messages::{
        DeleteRecordsRequest, DeleteRecordsResponse,
        delete_records_response::{DeleteRecordsPartitionResult, DeleteRecordsTopicResult},
    },
};
use millrace_engine::{PartitionKey, host::Host};
use uuid::Uuid;

use crate::{
    kafka::{errors::Failure, topics::find},
    node::{Node, OFFSETS_TOPIC},
    replication::Slot,
    router::scatter,
};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, request: DeleteRecordsRequest) -> DeleteRecordsResponse {
    let view = node.view();
    let mut work = Vec::new();
    let mut places = Vec::new();
    let mut topics = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        let image = find(&view, &topic.name, Uuid::nil(), false);
        let mut partitions = Vec::with_capacity(topic.partitions.len());
        for asked in topic.partitions {
            let resolved = match &image {
                Ok(image) if image.name == OFFSETS_TOPIC => Err(Failure::from(ResponseError::InvalidTopicException)),
                Ok(image) => Node::resolve(&view, image, asked.partition_index),
                Err(failure) => Err(failure.clone()),
            };
            let mut result = DeleteRecordsPartitionResult::default()
                .with_partition_index(asked.partition_index)
                .with_low_watermark(-1);
            match resolved {
                Ok(r) => {
                    places.push((topics.len(), partitions.len()));
                    work.push((r.shard, (r.key, r.leader_epoch, asked.offset)));
                }
                Err(failure) => result.error_code = failure.code(),
            }
            partitions.push(result);
        }
        topics.push(
            DeleteRecordsTopicResult::default()
                .with_name(topic.name)
                .with_partitions(partitions),
        );
    }
    let patience = Duration::from_millis(u64::try_from(request.timeout_ms).unwrap_or(0));
    let results = scatter(node, work, move |n, list| async move {
        let until = Instant::now() + patience;
        let mut begun = Vec::with_capacity(list.len());
        for (key, epoch, to) in list {
            let deleted = delete(&n, key, epoch, to).await;
            begun.push(deleted.map(|(slot, low)| (slot, epoch, low)));
        }
        let mut out = Vec::with_capacity(begun.len());
        for deleted in begun {
            out.push(match deleted {
                Ok((slot, epoch, low)) => everywhere(&n, &slot, epoch, low, until).await,
                Err(failure) => Err(failure),
            });
        }
        out
    })
    .await;
    for ((topic, partition), result) in places.into_iter().zip(results) {
        let slot = &mut topics[topic].partitions[partition];
        match result.map_err(Failure::from).and_then(|r| r) {
            Ok(low) => slot.low_watermark = low,
            Err(failure) => slot.error_code = failure.code(),
        }
    }
    DeleteRecordsResponse::default().with_topics(topics)
}

/// Moves the log start here. Returns the one that holds then.
async fn delete(node: &Rc<Node>, key: PartitionKey, epoch: i32, to: i64) -> Result<(Rc<Slot>, i64), Failure> {
    let slot = node.replication.slot(&key).ok_or_else(Failure::not_leader)?;
    slot.check_leads(epoch)?;
    let partition = Rc::clone(&slot.partition);
    let high_watermark = partition.status().high_watermark;
    let to = if to == -1 { high_watermark } else { to };
    if to < 0 || to > high_watermark {
        return Err(ResponseError::OffsetOutOfRange.into());
    }
    let low = node.engine.delete_records(&partition, to).await?;
    Ok((slot, low))
}

/// Waits until the replicas in sync have moved theirs, too.
async fn everywhere(node: &Rc<Node>, slot: &Slot, epoch: i32, low: i64, until: Instant) -> Result<i64, Failure> {
    let patience = async {
        node.host.sleep(until.saturating_duration_since(Instant::now())).await;
        Err(Failure::new(
            ResponseError::RequestTimedOut,
            "the replicas in sync have not all deleted the records in time; ask again",
        ))
    };
    futures_lite::future::or(slot.wait_deleted(epoch, low), patience).await?;
    Ok(low)
}
