//! OffsetDelete, version 0 (KIP-496).

use std::rc::Rc;

use kafka_protocol::messages::{
    OffsetDeleteRequest, OffsetDeleteResponse,
    offset_delete_response::{OffsetDeleteResponsePartition, OffsetDeleteResponseTopic},
};

use crate::{kafka::errors::Failure, node::Node};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, request: OffsetDeleteRequest) -> OffsetDeleteResponse {
    let group = request.group_id.to_string();
    let partitions: Vec<(String, i32)> = request
        .topics
        .iter()
        .flat_map(|t| t.partitions.iter().map(|p| (t.name.to_string(), p.partition_index)))
        .collect();
    let results = node
        .router
        .call(node, 0, move |n| async move {
            n.coordinator()
                .groups
                .remove(&n, &group, |groups| groups.delete_offsets(&group, &partitions))
                .await
        })
        .await;
    let results = match results {
        Ok(Ok(results)) => results,
        Ok(Err(error)) => return OffsetDeleteResponse::default().with_error_code(Failure::from(error).code()),
        Err(_) => {
            return OffsetDeleteResponse::default().with_error_code(Failure::coordinator_not_available().code());
        }
    };
    let mut results = results.into_iter();
    let topics = request
        .topics
        .into_iter()
        .map(|topic| {
            OffsetDeleteResponseTopic::default()
                .with_name(topic.name)
                .with_partitions(
                    topic
                        .partitions
                        .into_iter()
                        .map(|p| {
                            let error = results.next().and_then(Result::err);
                            OffsetDeleteResponsePartition::default()
                                .with_partition_index(p.partition_index)
                                .with_error_code(error.map_or(0, |e| Failure::from(e).code()))
                        })
                        .collect(),
                )
        })
        .collect();
    OffsetDeleteResponse::default().with_topics(topics)
}
