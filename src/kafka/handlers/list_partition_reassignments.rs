//! ListPartitionReassignments, version 0 (KIP-455): partitions whose replicas are being exchanged.

use std::{collections::HashSet, rc::Rc};

use kafka_protocol::{
    messages::{
        BrokerId, ListPartitionReassignmentsRequest, ListPartitionReassignmentsResponse, TopicName,
        list_partition_reassignments_response::{OngoingPartitionReassignment, OngoingTopicReassignment},
    },
    protocol::StrBytes,
};

use crate::node::Node;

/// Handles a request.
#[must_use]
pub fn handle(node: &Rc<Node>, request: &ListPartitionReassignmentsRequest) -> ListPartitionReassignmentsResponse {
    let view = node.view();
    let named: HashSet<(&str, i32)> = (request.topics.iter().flatten())
        .flat_map(|t| t.partition_indexes.iter().map(|p| (t.name.as_str(), *p)))
        .collect();
    let asked = |topic: &str, partition: usize| request.topics.is_none() || named.contains(&(topic, partition as i32));
    let ids = |nodes: &[i32]| nodes.iter().map(|n| BrokerId(*n)).collect();
    let topics = view.image.topics().filter_map(|topic| {
        let running = (topic.partitions.iter().enumerate())
            .filter(|(i, p)| !(p.adding.is_empty() && p.removing.is_empty()) && asked(&topic.name, *i));
        let partitions: Vec<_> = running
            .map(|(i, p)| {
                OngoingPartitionReassignment::default()
                    .with_partition_index(i as i32)
                    .with_replicas(ids(&p.replicas))
                    .with_adding_replicas(ids(&p.adding))
                    .with_removing_replicas(ids(&p.removing))
            })
            .collect();
        (!partitions.is_empty()).then(|| {
            OngoingTopicReassignment::default()
                .with_name(TopicName(StrBytes::from_string(topic.name.clone())))
                .with_partitions(partitions)
        })
    });
    ListPartitionReassignmentsResponse::default().with_topics(topics.collect())
}
