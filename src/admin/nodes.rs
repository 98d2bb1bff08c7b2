//! Nodes of a cluster: who they are, and how they come and go. What a function returns is there to be printed.

use std::{
    collections::{BTreeMap, HashSet},
    thread,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use kafka_protocol::{
    messages::{
        AddRaftVoterRequest, AlterPartitionReassignmentsRequest, BrokerId, DescribeQuorumRequest,
        IncrementalAlterConfigsRequest, ListPartitionReassignmentsRequest, MetadataRequest, MetadataResponse,
        RemoveRaftVoterRequest, TopicName, UnregisterBrokerRequest,
        alter_partition_reassignments_request::{ReassignablePartition, ReassignableTopic},
        describe_quorum_request::{PartitionData, TopicData},
        incremental_alter_configs_request::{AlterConfigsResource, AlterableConfig},
        metadata_response::MetadataResponsePartition,
    },
    protocol::StrBytes,
};
use millrace_cluster::controller::{
    members::REPLACEABLE,
    placement::{self, Place},
};

use super::client::{AdminError, Client};
use crate::{coordinator::controller::DRAINING, endpoints::node_of, kafka::configs::BROKER};

/// Pause between two looks at what is left to be moved.
const LOOK: Duration = Duration::from_millis(500);
/// How long a new voter may take to catch up, ms.
const CATCH_UP_MS: i32 = 30_000;

/// How long nothing may have moved before a line says what is waited for.
const STALLED: Duration = Duration::from_secs(10);
/// Partitions that a message names at the most.
const NAMED_MAX: usize = 5;

/// The cluster as it is.
struct Seen {
    quorum: Quorum,
    /// All topics, and the brokers that take part. Ids are those of nodes: with `core.endpoints` brokers tell of each core as a
    /// broker, and an answer names one node in several ways.
    metadata: MetadataResponse,
}

impl Seen {
    fn look(client: &mut Client) -> Result<Self, AdminError> {
        let quorum = quorum(client)?;
        let mut metadata = client.call(12, &MetadataRequest::default().with_topics(None))?;
        let to_node = |id: &mut BrokerId| *id = BrokerId(node_of(id.0, |n| quorum.has(n)));
        metadata.brokers.iter_mut().for_each(|b| to_node(&mut b.node_id));
        metadata.brokers.sort_by_key(|b| b.node_id);
        metadata.brokers.dedup_by_key(|b| b.node_id);
        for partition in metadata.topics.iter_mut().flat_map(|t| &mut t.partitions) {
            to_node(&mut partition.leader_id);
            partition.replica_nodes.iter_mut().for_each(to_node);
            partition.isr_nodes.iter_mut().for_each(to_node);
        }
        Ok(Self { quorum, metadata })
    }

    fn is_up(&self, node: i32) -> bool {
        self.metadata.brokers.iter().any(|b| b.node_id.0 == node)
    }

    /// Partitions that have a replica on a node, with their topics' names.
    fn held_by(&self, node: i32) -> impl Iterator<Item = (&str, &MetadataResponsePartition)> {
        (self.metadata.topics.iter())
            .flat_map(|t| {
                t.partitions
                    .iter()
                    .map(|p| (t.name.as_ref().map_or("", |n| n.as_str()), p))
            })
            .filter(move |(_, p)| p.replica_nodes.iter().any(|n| n.0 == node))
    }

    /// An error if partitions of a node cannot be copied from anywhere: all their in-sync replicas are down.
    fn refuse_lost(&self, node: i32) -> Result<(), AdminError> {
        let is_lost = |p: &MetadataResponsePartition| p.leader_id.0 < 0 && !p.isr_nodes.iter().any(|n| self.is_up(n.0));
        let lost: Vec<String> = (self.held_by(node).filter(|(_, p)| is_lost(p)))
            .map(|(topic, p)| format!("{topic}-{}", p.partition_index))
            .collect();
        if lost.is_empty() {
            return Ok(());
        }
        Err(AdminError::Refused(format!(
            "{} of its partitions have no in-sync replica on a node that is up, so there is nothing to copy: {}. Start the nodes that hold \
             them, or delete the topics; where a replica that lacks records may do, kafka-leader-election.sh --election-type UNCLEAN makes it lead",
            lost.len(),
            listed(&lost)
        )))
    }
}

/// The first few names of a list.
fn listed(names: &[String]) -> String {
    let more = names.len().saturating_sub(NAMED_MAX);
    let first = names[..names.len() - more].join(", ");
    if more > 0 {
        format!("{first} and {more} more")
    } else {
        first
    }
}

/// Members of the metadata quorum: its leader, who votes, who only listens.
struct Quorum {
    leader: i32,
    voters: Vec<i32>,
    listeners: Vec<i32>,
}

impl Quorum {
    fn has(&self, node: i32) -> bool {
        self.voters.contains(&node) || self.listeners.contains(&node)
    }
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
    let Seen { quorum, metadata } = Seen::look(&mut client)?;
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
    let seen = Seen::look(&mut client)?;
    let held = seen.held_by(node).count();
    if held > 0 {
        return Err(AdminError::Refused(format!(
            "node {node} still holds replicas of {held} partitions: `millrace cluster drain {node}` moves them to other nodes"
        )));
    }
    let ended = end_vote(&mut client, &seen, node)?;
    let answer = client.call(0, &UnregisterBrokerRequest::default().with_broker_id(BrokerId(node)))?;
    AdminError::check(answer.error_code, answer.error_message.as_ref())?;
    Ok(format!(
        "{ended}node {node} is forgotten; with an emptied folder it can join anew\n"
    ))
}

/// Lets another data folder take the place of a node that is down for good.
///
/// # Errors
/// [`AdminError`].
pub fn replace(bootstrap: &str, node: i32) -> Result<String, AdminError> {
    let mut client = Client::connect(bootstrap)?;
    let seen = Seen::look(&mut client)?;
    if !seen.quorum.has(node) {
        return Err(AdminError::Refused(format!(
            "node {node} is not in this cluster: a new one just joins"
        )));
    }
    if seen.is_up(node) {
        return Err(AdminError::Refused(format!(
            "node {node} is up: stop it for good first"
        )));
    }
    set(&mut client, node, REPLACEABLE, true)?;
    Ok(format!(
        "node {node} may come with an empty data folder from another machine, once; with the folder that it had it is refused from then on\n"
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

/// Ends a node's vote if it has one, and says what that means for the others.
fn end_vote(client: &mut Client, seen: &Seen, node: i32) -> Result<String, AdminError> {
    let quorum = &seen.quorum;
    if !quorum.voters.contains(&node) {
        return Ok(String::new());
    }
    let request = RemoveRaftVoterRequest::default()
        .with_cluster_id(None)
        .with_voter_id(node);
    let answer = client.call(0, &request)?;
    AdminError::check(answer.error_code, answer.error_message.as_ref())?;
    let left = quorum.voters.len() - 1;
    let mut text = format!("node {node} votes no more\n");
    if left.is_multiple_of(2) || left < 3 {
        let may_fail = (left - 1) / 2;
        let next = quorum.listeners.iter().find(|n| **n != node && seen.is_up(**n));
        let advice = match next {
            Some(next) => format!("make node {next} one: millrace cluster add-node {next}"),
            None => "start a node more, and make it one with `millrace cluster add-node`".to_owned(),
        };
        text += &format!(
            "{left} voters are left: {may_fail} of them may fail before the metadata quorum stands still. For one voter more, {advice}\n"
        );
    }
    Ok(text)
}

/// Moves all replicas of a node to others, waits until it is done, and ends its vote in the metadata quorum.
///
/// # Errors
/// [`AdminError`]; what has been moved stays moved. After a refusal the node takes new replicas again.
pub fn drain(bootstrap: &str, node: i32) -> Result<String, AdminError> {
    let mut client = Client::connect(bootstrap)?;
    let seen = Seen::look(&mut client)?;
    if !seen.quorum.has(node) {
        return Err(AdminError::Refused(format!(
            "node {node} is not in this cluster: `millrace cluster status` lists its nodes"
        )));
    }
    if seen.quorum.voters == [node] {
        return Err(AdminError::Refused(format!(
            "node {node} is the only voter of the metadata quorum: make another one a voter first, with `millrace cluster add-node`"
        )));
    }
    // What is refused now has changed nothing.
    seen.refuse_lost(node)?;
    moves(&mut client, &seen, node)?;
    set_draining(&mut client, node, true)?;
    let total = match move_all(&mut client, node) {
        Ok(total) => total,
        Err(AdminError::Refused(reason)) => {
            set_draining(&mut client, node, false)?;
            return Err(AdminError::Refused(format!(
                "{reason}. Node {node} takes new replicas again; partitions that are being moved go on"
            )));
        }
        Err(other) => {
            eprintln!("node {node} still takes no new replicas: drain it again, or end that with --undo");
            return Err(other);
        }
    };
    let seen = Seen::look(&mut client)?;
    let ended = end_vote(&mut client, &seen, node)?;
    Ok(format!(
        "{ended}node {node} holds nothing any more ({total} partitions moved). Stop it, then: millrace cluster remove-node {node}\n"
    ))
}

/// Has all replicas of a node moved and waits until they are; returns how many there were.
fn move_all(client: &mut Client, node: i32) -> Result<usize, AdminError> {
    let mut seen = Seen::look(client)?;
    let total = seen.held_by(node).count();
    let bar = ProgressBar::new(total as u64);
    let style = ProgressStyle::with_template("{bar:30} {pos} of {len} partitions moved, {eta} left");
    bar.set_style(style.expect("a sound template"));
    let (mut least, mut since) = (usize::MAX, Instant::now());
    loop {
        let left = seen.held_by(node).count();
        bar.set_position(total.saturating_sub(left) as u64);
        if left == 0 {
            bar.finish_and_clear();
            return Ok(total);
        }
        seen.refuse_lost(node)?;
        let wanted = moves(client, &seen, node)?;
        if !wanted.is_empty() {
            reassign(client, wanted)?;
        }
        if left < least {
            (least, since) = (left, Instant::now());
        } else if since.elapsed() > STALLED {
            since = Instant::now();
            let waiting: Vec<String> = (seen.held_by(node))
                .map(|(topic, p)| format!("{topic}-{}", p.partition_index))
                .collect();
            bar.suspend(|| {
                eprintln!(
                    "waiting for {left} partitions whose new replicas are not in sync yet: {}",
                    listed(&waiting)
                );
            });
        }
        thread::sleep(LOOK);
        seen = Seen::look(client)?;
    }
}

fn set_draining(client: &mut Client, node: i32, draining: bool) -> Result<(), AdminError> {
    set(client, node, DRAINING, draining)
}

/// Sets a dynamic setting of a broker.
fn set(client: &mut Client, node: i32, name: &'static str, value: bool) -> Result<(), AdminError> {
    let config = AlterableConfig::default()
        .with_name(StrBytes::from_static_str(name))
        .with_value(Some(StrBytes::from_static_str(if value { "true" } else { "false" })));
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

/// Another replica in the stead of each on `node`, where that was not asked for yet.
fn moves(client: &mut Client, seen: &Seen, node: i32) -> Result<Vec<ReassignableTopic>, AdminError> {
    let metadata = &seen.metadata;
    let places: Vec<Place> = (metadata.brokers.iter())
        .filter(|b| b.node_id.0 != node)
        .map(|b| Place {
            node: b.node_id.0,
            rack: b.rack.as_ref().map(|r| r.to_string()),
            active: true,
        })
        .collect();
    let mut load: BTreeMap<i32, usize> = BTreeMap::new();
    for replica in (metadata.topics.iter()).flat_map(|t| t.partitions.iter().flat_map(|p| &p.replica_nodes)) {
        *load.entry(replica.0).or_default() += 1;
    }
    let answer = client.call(0, &ListPartitionReassignmentsRequest::default().with_topics(None))?;
    let running: HashSet<(&str, i32)> = (answer.topics.iter())
        .flat_map(|t| t.partitions.iter().map(|p| (t.name.as_str(), p.partition_index)))
        .collect();
    let mut topics: BTreeMap<&str, Vec<ReassignablePartition>> = BTreeMap::new();
    for (name, partition) in seen.held_by(node) {
        if running.contains(&(name, partition.partition_index)) {
            continue;
        }
        let replicas: Vec<i32> = partition.replica_nodes.iter().map(|n| n.0).collect();
        let found = placement::substitute(&places, &replicas, Some(node), |n| load.get(&n).copied().unwrap_or(0));
        let Some(instead) = found else {
            return Err(AdminError::Refused(format!(
                "{name}-{} has a replica on every node that is up: add a node first, or give the topic fewer replicas",
                partition.partition_index
            )));
        };
        *load.entry(instead).or_default() += 1;
        let target = replicas.iter().map(|n| BrokerId(if *n == node { instead } else { *n }));
        topics.entry(name).or_default().push(
            ReassignablePartition::default()
                .with_partition_index(partition.partition_index)
                .with_replicas(Some(target.collect())),
        );
    }
    let of_topic = |(name, partitions): (&str, Vec<ReassignablePartition>)| {
        ReassignableTopic::default()
            .with_name(TopicName(StrBytes::from_string(name.to_owned())))
            .with_partitions(partitions)
    };
    Ok(topics.into_iter().map(of_topic).collect())
}

fn reassign(client: &mut Client, topics: Vec<ReassignableTopic>) -> Result<(), AdminError> {
    let answer = client.call(0, &AlterPartitionReassignmentsRequest::default().with_topics(topics))?;
    AdminError::check(answer.error_code, answer.error_message.as_ref())?;
    for partition in answer.responses.iter().flat_map(|t| &t.partitions) {
        AdminError::check(partition.error_code, partition.error_message.as_ref())?;
    }
    Ok(())
}
