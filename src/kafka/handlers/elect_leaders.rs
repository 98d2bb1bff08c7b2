//! ElectLeaders, versions 0 to 2: preferred leaders (KIP-183), and for partitions without a leader any replica (KIP-460), which
//! may lack what was acknowledged.

use std::{
    collections::{BTreeMap, HashSet},
    rc::Rc,
};

use kafka_protocol::{
    ResponseError,
    messages::{
        ElectLeadersRequest, ElectLeadersResponse, TopicName,
        elect_leaders_response::{PartitionResult, ReplicaElectionResult},
    },
    protocol::StrBytes,
};
use millrace_cluster::{controller::brokers, metadata::Image};
use uuid::Uuid;

use crate::{kafka::errors::Failure, node::Node};

/// Why nobody is elected for a partition, if so.
fn check(image: &Image, topic: &str, partition: i32, unclean: bool) -> Result<(), Failure> {
    let found = image
        .topic(topic)
        .and_then(|t| t.partitions.get(usize::try_from(partition).ok()?));
    let found = found.ok_or_else(Failure::unknown_partition)?;
    if unclean {
        return match found.leader {
            -1 if found.replicas.iter().any(|n| image.is_active(*n)) => Ok(()),
            -1 => Err(Failure::new(
                ResponseError::EligibleLeadersNotAvailable,
                "no replica takes part in the cluster now",
            )),
            leader => Err(Failure::new(
                ResponseError::ElectionNotNeeded,
                format!("broker {leader} leads"),
            )),
        };
    }
    let preferred = found.replicas.first().copied().unwrap_or(-1);
    if found.leader == preferred {
        return Err(Failure::new(
            ResponseError::ElectionNotNeeded,
            "the preferred leader leads already",
        ));
    }
    if !found.isr.contains(&preferred) || !image.is_active(preferred) {
        return Err(Failure::new(
            ResponseError::PreferredLeaderNotAvailable,
            format!("the preferred leader, broker {preferred}, is not in sync"),
        ));
    }
    Ok(())
}

/// Handles a request.
pub async fn handle(node: &Rc<Node>, version: i16, request: ElectLeadersRequest) -> ElectLeadersResponse {
    let unclean = version >= 1 && request.election_type != 0;
    let view = node.view();
    let all = request.topic_partitions.is_none();
    let asked: Vec<(String, i32)> = match request.topic_partitions {
        Some(topics) => (topics.into_iter())
            .flat_map(|t| {
                let name = t.topic.to_string();
                t.partitions.into_iter().map(move |p| (name.clone(), p))
            })
            .collect(),
        None => (view.image.topics())
            .flat_map(|t| (0..t.partitions.len() as i32).map(|p| (t.name.clone(), p)))
            .collect(),
    };
    let elected = {
        let wanted = asked.clone();
        node.router
            .call(node, 0, move |n| async move {
                n.coordinator()
                    .controller
                    .change_for_client(&n, |image| {
                        let results: Vec<Result<(), Failure>> =
                            wanted.iter().map(|(t, p)| check(image, t, *p, unclean)).collect();
                        let known = wanted.iter().filter_map(|(t, p)| Some((image.topic(t)?.id, *p as u32)));
                        let known: HashSet<(Uuid, u32)> = known.collect();
                        let asked_for = |topic, partition| known.contains(&(topic, partition));
                        let records = match unclean {
                            true => brokers::elect_unclean(image, asked_for),
                            false => brokers::elect_preferred(image, asked_for),
                        };
                        (records, results)
                    })
                    .await
            })
            .await
            .map_err(Failure::from)
            .and_then(|r| r)
    };
    let results = match elected {
        Ok(results) => results,
        Err(failure) => vec![Err(failure); asked.len()],
    };
    let mut topics: BTreeMap<String, Vec<PartitionResult>> = BTreeMap::new();
    for ((topic, partition), result) in asked.into_iter().zip(results) {
        let mut answer = PartitionResult::default().with_partition_id(partition);
        if let Err(failure) = result {
            // Who asks for all wants to hear of those that something was done about.
            if all && failure.error == ResponseError::ElectionNotNeeded {
                continue;
            }
            answer = answer
                .with_error_code(failure.code())
                .with_error_message(failure.text());
        }
        topics.entry(topic).or_default().push(answer);
    }
    let results = topics.into_iter().map(|(topic, partitions)| {
        ReplicaElectionResult::default()
            .with_topic(TopicName(StrBytes::from_string(topic)))
            .with_partition_result(partitions)
    });
    ElectLeadersResponse::default().with_replica_election_results(results.collect())
}
