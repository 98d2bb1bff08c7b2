//! DeleteRecords, versions 0 to 2 (KIP-107): moves the log start; -1 means the high watermark.

use std::rc::Rc;

use kafka_protocol::{
    ResponseError,
    messages::{
        DeleteRecordsRequest, DeleteRecordsResponse,
        delete_records_response::{DeleteRecordsPartitionResult, DeleteRecordsTopicResult},
    },
};
use millrace_engine::PartitionKey;
use uuid::Uuid;

use crate::{
    kafka::{errors::Failure, topics::find},
    node::{Node, OFFSETS_TOPIC},
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
                    work.push((r.shard, (r.key, asked.offset)));
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
    let results = scatter(node, work, |n, list| async move {
        let mut out = Vec::with_capacity(list.len());
        for (key, to) in list {
            out.push(delete(&n, key, to).await);
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

async fn delete(node: &Rc<Node>, key: PartitionKey, to: i64) -> Result<i64, Failure> {
    let partition = node.engine.partition(&key).ok_or_else(Failure::unknown_partition)?;
    let high_watermark = partition.status().high_watermark;
    let to = if to == -1 { high_watermark } else { to };
    if to < 0 || to > high_watermark {
        return Err(ResponseError::OffsetOutOfRange.into());
    }
    Ok(node.engine.delete_records(&partition, to).await?)
}
