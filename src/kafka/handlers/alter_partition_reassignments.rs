//! AlterPartitionReassignments, versions 0 to 1 (KIP-455, KIP-860): exchanges replicas while partitions serve. Each partition
//! succeeds or fails by itself.

use std::rc::Rc;

use kafka_protocol::{
    ResponseError,
    messages::{
        AlterPartitionReassignmentsRequest, AlterPartitionReassignmentsResponse,
        alter_partition_reassignments_response::{ReassignablePartitionResponse, ReassignableTopicResponse},
    },
};
use millrace_cluster::{
    controller::reassign::{self, Wish},
    metadata::{Image, MetadataRecord},
};

use crate::{endpoints::nodes_of, kafka::errors::Failure, node::Node};

/// One partition as it is asked for.
#[derive(Clone)]
struct Asked {
    topic: String,
    partition: i32,
    replicas: Option<Vec<i32>>,
}

fn decide(image: &Image, asked: &Asked, may_change_factor: bool) -> Result<Option<MetadataRecord>, Failure> {
    let topic = image.topic(&asked.topic).ok_or_else(Failure::unknown_partition)?;
    let index = u32::try_from(asked.partition).map_err(|_| Failure::unknown_partition())?;
    let partition = topic
        .partitions
        .get(index as usize)
        .ok_or_else(Failure::unknown_partition)?;
    if let Some(replicas) = &asked.replicas
        && !may_change_factor
        && replicas.len() != reassign::target(partition).len()
    {
        return Err(Failure::new(
            ResponseError::InvalidReplicationFactor,
            "the number of replicas would change, and the request does not allow that",
        ));
    }
    let wish = Wish {
        topic: topic.id,
        partition: index,
        replicas: asked.replicas.clone(),
    };
    Ok(reassign::alter(image, &wish)?)
}

/// Handles a request.
pub async fn handle(
    node: &Rc<Node>,
    version: i16,
    request: AlterPartitionReassignmentsRequest,
) -> AlterPartitionReassignmentsResponse {
    let may_change_factor = version < 1 || request.allow_replication_factor_change;
    let mut response =
        AlterPartitionReassignmentsResponse::default().with_allow_replication_factor_change(may_change_factor);
    let known = node.view();
    let asked: Vec<Asked> = (request.topics.iter())
        .flat_map(|t| {
            t.partitions.iter().map(|p| Asked {
                topic: t.name.to_string(),
                partition: p.partition_index,
                replicas: p.replicas.as_ref().map(|all| nodes_of(&known.image, all)),
            })
        })
        .collect();
    let changed = node.router.call(node, 0, move |n| async move {
        n.coordinator()
            .controller
            .change_for_client(&n, |image| {
                let mut image = image.clone();
                let mut records = Vec::new();
                let mut results = Vec::with_capacity(asked.len());
                for one in &asked {
                    results.push(decide(&image, one, may_change_factor).map(|record| {
                        image.extend(record.as_slice());
                        records.extend(record);
                    }));
                }
                (records, results)
            })
            .await
    });
    let changed = changed.await.map_err(Failure::from).and_then(|r| r);
    let mut results = match changed {
        Ok(results) => results.into_iter(),
        Err(failure) => {
            return response
                .with_error_code(failure.code())
                .with_error_message(failure.text());
        }
    };
    for topic in request.topics {
        let partitions = topic.partitions.into_iter().map(|p| {
            let answer = ReassignablePartitionResponse::default().with_partition_index(p.partition_index);
            match results.next() {
                Some(Err(failure)) => answer
                    .with_error_code(failure.code())
                    .with_error_message(failure.text()),
                _ => answer,
            }
        });
        let partitions = partitions.collect();
        let answer = ReassignableTopicResponse::default().with_name(topic.name);
        response.responses.push(answer.with_partitions(partitions));
    }
    response
}
