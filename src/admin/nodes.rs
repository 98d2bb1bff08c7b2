//! Nodes of a cluster: who they are, and how they come and go. What a function returns is there to be printed.

use std::{collections::BTreeMap, thread, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};
use kafka_protocol::{
    messages::{
        AddRaftVoterRequest, AlterPartitionReassignmentsRequest, BrokerId, DescribeQuorumRequest,
        IncrementalAlterConfigsRequest, MetadataRequest, MetadataResponse, RemoveRaftVoterRequest, TopicName,
        UnregisterBrokerRequest,
        alter_partition_reassignments_request::{ReassignablePartition, ReassignableTopic},
        describe_quorum_request::{PartitionData, TopicData},
        incremental_alter_configs_request::{AlterConfigsResource, AlterableConfig},
    },
    protocol::StrBytes,
};
use millrace_cluster::controller::placement::{self, Place};

use super::client::{AdminError, Client};
use crate::{coordinator::controller::DRAINING, kafka::configs::BROKER};

/// Pause between two looks at what is left to be moved.
const LOOK: Duration = Duration::from_millis(500);
/// How long a new voter may take to catch up, ms.
const CATCH_UP_MS: i32 = 30_000;

fn metadata(client: &mut Client) -> Result<MetadataResponse, AdminError> {
    client.call(12, &MetadataRequest::default().with_topics(None))
}

/// Members of the metadata quorum: its leader, who votes, who only listens.
struct Quorum {
    leader: i32,
    voters: Vec<i32>,
    listeners: Vec<i32>,
}

fn quorum(client: &mut Client) -> Result<Quorum, AdminError> {
    let topic = TopicData::default()
        .with_topic_name(TopicName(StrBytes::from_static_str("__cluster_metadata")))
        .with_partitions(vec![PartitionData::default()]);
    let mut answer = client.call(2, &DescribeQuorumRequest::default().with_topics(vec![topic]))?;
    AdminError::check(answer.error_code, answer.error_message.as_ref())?;
    let partition = (answer.topics.pop())
        .and_then(|mut t| t.partitions.pop())
        .ok_or_else(|| AdminError::Answer("no quorum is in it".into()))?;
    let ids = |all: Vec<kafka_protocol::messages::describe_quorum_response::ReplicaState>| {
        all.into_iter().map(|r| r.replica_id.0).collect()
    };
    Ok(Quorum {
        leader: partition.leader_id.0,
        voters: ids(partition.current_voters),
        listeners: ids(partition.observers),
    })
}

/// A table of who is in the cluster, what each leads and holds, and what is not as it should be.
///
/// # Errors
/// [`AdminError`].
pub fn status(bootstrap: &str) -> Result<String, AdminError> {
    let mut client = Client::connect(bootstrap)?;
    let quorum = quorum(&mut client)?;
    let metadata = metadata(&mut client)?;
    let mut counts: BTreeMap<i32, (usize, usize)> = BTreeMap::new();
    let (mut partitions, mut offline, mut lagging) = (0, 0, 0);
    for partition in metadata.topics.iter().flat_map(|t| &t.partitions) {
        partitions += 1;
        offline += usize::from(partition.leader_id.0 < 0);
        lagging += usize::from(partition.isr_nodes.len() < partition.replica_nodes.len());
        counts.entry(partition.leader_id.0).or_default().0 += 1;
        for replica in &partition.replica_nodes {
            counts.entry(replica.0).or_default().1 += 1;
        }
    }
    let mut table = format!(
        "cluster {}\n{:>6}  {:24} {:9} {:8} {:>7} {:>9}\n",
        metadata.cluster_id.as_deref().unwrap_or("without a name"),
        "node",
        "clients connect to",
        "quorum",
        "rack",
        "leads",
        "replicas"
    );
    let mut nodes: Vec<&i32> = quorum.voters.iter().chain(&quorum.listeners).collect();
    nodes.sort_unstable();
    for node in nodes {
        let broker = metadata.brokers.iter().find(|b| b.node_id.0 == *node);
        let role = match node {
            n if *n == quorum.leader => "leads",
            n if quorum.voters.contains(n) => "votes",
            _ => "listens",
        };
        let (leads, replicas) = counts.get(node).copied().unwrap_or_default();
        let address = broker.map_or("down".to_owned(), |b| format!("{}:{}", b.host.as_str(), b.port));
        let rack = broker.and_then(|b| b.rack.as_deref()).unwrap_or("-");
        table += &format!("{node:>6}  {address:24} {role:9} {rack:8} {leads:>7} {replicas:>9}\n");
    }
    table += &format!("{partitions} partitions, {lagging} with replicas out of sync, {offline} without a leader\n");
    Ok(table)
}

/// Makes a node that has joined a voter of the metadata quorum.
///
/// # Errors
/// [`AdminError`].
pub fn add(bootstrap: &str, node: i32) -> Result<String, AdminError> {
    let mut client = Client::connect(bootstrap)?;
    let request = AddRaftVoterRequest::default()
        .with_cluster_id(None)
        .with_voter_id(node)
        .with_timeout_ms(CATCH_UP_MS);
    let answer = client.call(0, &request)?;
    AdminError::check(answer.error_code, answer.error_message.as_ref())?;
    Ok(format!("node {node} votes in the metadata quorum\n"))
}

/// Takes a drained, stopped node out of the cluster for good.
///
/// # Errors
/// [`AdminError`].
pub fn remove(bootstrap: &str, node: i32) -> Result<String, AdminError> {
    let mut client = Client::connect(bootstrap)?;
    let held = count(&metadata(&mut client)?, node);
    if held > 0 {
        return Err(AdminError::Refused(format!(
            "node {node} still holds replicas of {held} partitions: `millrace cluster drain {node}` moves them to other nodes"
        )));
    }
    let ended = end_vote(&mut client, node)?;
    let answer = client.call(0, &UnregisterBrokerRequest::default().with_broker_id(BrokerId(node)))?;
    AdminError::check(answer.error_code, answer.error_message.as_ref())?;
    Ok(format!(
        "{ended}node {node} is forgotten; with an emptied folder it can join anew\n"
    ))
}

/// Lets new replicas be put on a node again.
///
/// # Errors
/// [`AdminError`].
pub fn undrain(bootstrap: &str, node: i32) -> Result<String, AdminError> {
    set_draining(&mut Client::connect(bootstrap)?, node, false)?;
    Ok(format!("node {node} takes new replicas again\n"))
}

fn end_vote(client: &mut Client, node: i32) -> Result<String, AdminError> {
    if !quorum(client)?.voters.contains(&node) {
        return Ok(String::new());
    }
    let request = RemoveRaftVoterRequest::default()
        .with_cluster_id(None)
        .with_voter_id(node);
    let answer = client.call(0, &request)?;
    AdminError::check(answer.error_code, answer.error_message.as_ref())?;
    Ok(format!("node {node} votes no more\n"))
}

/// Moves all replicas of a node to others, waits until it is done, and ends its vote in the metadata quorum.
///
/// # Errors
/// [`AdminError`]; what has been moved stays moved.
pub fn drain(bootstrap: &str, node: i32) -> Result<String, AdminError> {
    let mut client = Client::connect(bootstrap)?;
    if quorum(&mut client)?.voters == [node] {
        return Err(AdminError::Refused(format!(
            "node {node} is the only voter of the metadata quorum: make another one a voter first, with `millrace cluster add-node`"
        )));
    }
    set_draining(&mut client, node, true)?;
    let mut seen = metadata(&mut client)?;
    let total = count(&seen, node);
    let bar = ProgressBar::new(total as u64);
    let style = ProgressStyle::with_template("{bar:30} {pos} of {len} partitions moved, {eta} left");
    bar.set_style(style.expect("a sound template"));
    loop {
        let left = count(&seen, node);
        bar.set_position(total.saturating_sub(left) as u64);
        if left == 0 {
            break;
        }
        move_away(&mut client, &seen, node)?;
        thread::sleep(LOOK);
        seen = metadata(&mut client)?;
    }
    bar.finish_and_clear();
    let ended = end_vote(&mut client, node)?;
    Ok(format!(
        "{ended}node {node} holds nothing any more ({total} partitions moved). Stop it, then: millrace cluster remove-node {node}\n"
    ))
}

fn set_draining(client: &mut Client, node: i32, draining: bool) -> Result<(), AdminError> {
    let config = AlterableConfig::default()
        .with_name(StrBytes::from_static_str(DRAINING))
        .with_value(Some(StrBytes::from_static_str(if draining { "true" } else { "false" })));
    let resource = AlterConfigsResource::default()
        .with_resource_type(BROKER)
        .with_resource_name(StrBytes::from_string(node.to_string()))
        .with_configs(vec![config]);
    let answer = client.call(
        1,
        &IncrementalAlterConfigsRequest::default().with_resources(vec![resource]),
    )?;
    for response in &answer.responses {
        AdminError::check(response.error_code, response.error_message.as_ref())?;
    }
    Ok(())
}

/// Partitions that have a replica on a node.
fn count(metadata: &MetadataResponse, node: i32) -> usize {
    let holds = |p: &&kafka_protocol::messages::metadata_response::MetadataResponsePartition| {
        p.replica_nodes.iter().any(|n| n.0 == node)
    };
    metadata.topics.iter().flat_map(|t| &t.partitions).filter(holds).count()
}

/// Asks for another replica in the stead of each on `node`, where that was not asked for yet.
fn move_away(client: &mut Client, metadata: &MetadataResponse, node: i32) -> Result<(), AdminError> {
    let places: Vec<Place> = (metadata.brokers.iter())
        .filter(|b| b.node_id.0 != node)
        .map(|b| Place {
            node: b.node_id.0,
            rack: b.rack.as_ref().map(|r| r.to_string()),
        })
        .collect();
    let mut load: BTreeMap<i32, usize> = BTreeMap::new();
    for replica in (metadata.topics.iter()).flat_map(|t| t.partitions.iter().flat_map(|p| &p.replica_nodes)) {
        *load.entry(replica.0).or_default() += 1;
    }
    let running = client.call(
        0,
        &kafka_protocol::messages::ListPartitionReassignmentsRequest::default().with_topics(None),
    )?;
    let is_running = |topic: &str, partition: i32| {
        (running.topics.iter())
            .any(|t| t.name.as_str() == topic && t.partitions.iter().any(|p| p.partition_index == partition))
    };
    let mut topics = Vec::new();
    for topic in &metadata.topics {
        let name = topic.name.as_ref().map_or("", |n| n.as_str());
        let mut partitions = Vec::new();
        for partition in &topic.partitions {
            let replicas: Vec<i32> = partition.replica_nodes.iter().map(|n| n.0).collect();
            if !replicas.contains(&node) || is_running(name, partition.partition_index) {
                continue;
            }
            let found = placement::substitute(&places, &replicas, node, |n| load.get(&n).copied().unwrap_or(0));
            let Some(instead) = found else {
                return Err(AdminError::Refused(format!(
                    "{name}-{} has a replica on every node: add a node first, or give the topic fewer replicas",
                    partition.partition_index
                )));
            };
            *load.entry(instead).or_default() += 1;
            let target = replicas.iter().map(|n| BrokerId(if *n == node { instead } else { *n }));
            partitions.push(
                ReassignablePartition::default()
                    .with_partition_index(partition.partition_index)
                    .with_replicas(Some(target.collect())),
            );
        }
        if !partitions.is_empty() {
            topics.push(
                ReassignableTopic::default()
                    .with_name(topic.name.clone().unwrap_or_default())
                    .with_partitions(partitions),
            );
        }
    }
    if topics.is_empty() {
        return Ok(());
    }
    let answer = client.call(0, &AlterPartitionReassignmentsRequest::default().with_topics(topics))?;
    AdminError::check(answer.error_code, answer.error_message.as_ref())?;
    for partition in answer.responses.iter().flat_map(|t| &t.partitions) {
        AdminError::check(partition.error_code, partition.error_message.as_ref())?;
    }
    Ok(())
}
