//! DescribeProducers, version 0 (KIP-664): the idempotent producers that a partition remembers.

use std::rc::Rc;

use kafka_protocol::messages::{
    DescribeProducersRequest, DescribeProducersResponse,
    describe_producers_response::{PartitionResponse, ProducerState, TopicResponse},
};
use uuid::Uuid;

use crate::{kafka::topics::find, node::Node, router::scatter};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, request: DescribeProducersRequest) -> DescribeProducersResponse {
    let view = node.view();
    let mut work = Vec::new();
    let mut places = Vec::new();
    let mut topics = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        let image = find(&view, &topic.name, Uuid::nil(), false);
        let mut partitions = Vec::with_capacity(topic.partition_indexes.len());
        for index in topic.partition_indexes {
            let mut response = PartitionResponse::default().with_partition_index(index);
            let resolved = image
                .as_ref()
                .map_err(Clone::clone)
                .and_then(|image| Node::resolve(&view, image, index));
            match resolved {
                Ok(r) => {
                    places.push((topics.len(), partitions.len()));
                    work.push((r.shard, r.key));
                }
                Err(failure) => {
                    response.error_code = failure.code();
                    response.error_message = failure.text();
                }
            }
            partitions.push(response);
        }
        topics.push(
            TopicResponse::default()
                .with_name(topic.name)
                .with_partitions(partitions),
        );
    }
    let results = scatter(node, work, |n, keys| async move {
        keys.iter()
            .map(|key| {
                n.engine.partition(key).map_or_else(Vec::new, |p| {
                    p.with_state(|s| {
                        s.producers
                            .iter()
                            .map(|(id, e)| (id, i32::from(e.epoch), e.last_sequence(), e.last_written_ms))
                            .collect()
                    })
                })
            })
            .collect::<Vec<Vec<_>>>()
    })
    .await;
    for ((topic, partition), result) in places.into_iter().zip(results) {
        topics[topic].partitions[partition].active_producers = result
            .unwrap_or_default()
            .into_iter()
            .map(|(id, epoch, sequence, at)| {
                ProducerState::default()
                    .with_producer_id(id.into())
                    .with_producer_epoch(epoch)
                    .with_last_sequence(sequence)
                    .with_last_timestamp(at)
                    .with_current_txn_start_offset(-1)
            })
            .collect();
    }
    DescribeProducersResponse::default().with_topics(topics)
}
