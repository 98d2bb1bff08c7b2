//! DescribeTopicPartitions, version 0 (KIP-966): Metadata in pages, with eligible leader replicas.

use std::rc::Rc;

use kafka_protocol::{
    ResponseError,
    messages::{
        DescribeTopicPartitionsRequest, DescribeTopicPartitionsResponse, TopicName,
        describe_topic_partitions_response::{
            Cursor, DescribeTopicPartitionsResponsePartition, DescribeTopicPartitionsResponseTopic,
        },
    },
    protocol::StrBytes,
};

use crate::{
    kafka::operations::OF_TOPICS,
    node::{Node, OFFSETS_TOPIC},
};

/// Most partitions in one answer, whatever the request says (Kafka's `max.request.partition.size.limit`).
const PARTITIONS_MAX: i32 = 2000;

/// Handles a request.
#[must_use]
pub fn handle(node: &Rc<Node>, request: &DescribeTopicPartitionsRequest) -> DescribeTopicPartitionsResponse {
    let view = node.view();
    let endpoints = node.endpoints();
    let mut names: Vec<String> = request.topics.iter().map(|t| t.name.to_string()).collect();
    let all = names.is_empty();
    if all {
        names = view.image.topics().map(|t| t.name.clone()).collect();
    }
    names.sort_unstable();
    names.dedup();
    let mut first = 0;
    if let Some(cursor) = &request.cursor {
        names.retain(|n| n.as_str() >= cursor.topic_name.as_str());
        if names.first().is_some_and(|n| n.as_str() == cursor.topic_name.as_str()) {
            first = usize::try_from(cursor.partition_index).unwrap_or(0);
        }
    }
    let mut room = request.response_partition_limit.clamp(1, PARTITIONS_MAX) as usize;
    let mut response = DescribeTopicPartitionsResponse::default();
    for name in names {
        let topic_name = TopicName(StrBytes::from_string(name.clone()));
        let mut topic = DescribeTopicPartitionsResponseTopic::default()
            .with_name(Some(topic_name.clone()))
            .with_topic_authorized_operations(OF_TOPICS);
        let Some(image) = view.image.topic(&name) else {
            topic.error_code = ResponseError::UnknownTopicOrPartition.code();
            response.topics.push(topic);
            continue;
        };
        if room == 0 {
            response.next_cursor = Some(Cursor::default().with_topic_name(topic_name).with_partition_index(0));
            break;
        }
        topic.topic_id = image.id;
        topic.is_internal = name == OFFSETS_TOPIC;
        topic.partitions = image
            .partitions
            .iter()
            .enumerate()
            .skip(first)
            .take(room)
            .map(|(index, p)| {
                let broker = endpoints.naming(&view, image.id, index as u32);
                DescribeTopicPartitionsResponsePartition::default()
                    .with_partition_index(index as i32)
                    .with_leader_id(broker(&p.leader))
                    .with_leader_epoch(p.leader_epoch)
                    .with_replica_nodes(p.replicas.iter().map(&broker).collect())
                    .with_isr_nodes(p.isr.iter().map(&broker).collect())
                    .with_eligible_leader_replicas(Some(Vec::new()))
                    .with_last_known_elr(Some(Vec::new()))
            })
            .collect();
        let shown = topic.partitions.len();
        room -= shown;
        let next = first + shown;
        first = 0;
        response.topics.push(topic);
        if next < image.partitions.len() {
            response.next_cursor = Some(
                Cursor::default()
                    .with_topic_name(topic_name)
                    .with_partition_index(next as i32),
            );
            break;
        }
    }
    response
}
