//! Metadata, versions 0 to 13: topics by name or id, auto-creation (version 4 and above ask for it, older ones always
//! do), brokers or their cores.
//!
//! What a client is told first it believes for long: a partition that was led by nobody, or by a broker of whom others do not know,
//! stays unknown to librdkafka's queries of offsets until it refreshes its metadata, minutes later. So the first answer on a
//! connection, and one that was asked before that was known, rests on all that was agreed on, which this node may be late to hear of,
//! and waits until who follows a leader that has died is elected. Later ones name nobody meanwhile and keep nobody waiting: librdkafka
//! goes on sending to the dead leader until it is told, and waits longer after each failure (kernel-notes.md). Once a majority of the
//! quorum is gone nobody waits: what this node leads can be read.
//!
//! A broker that seems to have died is not told of, but again for a moment once others lead what it led (`Departures`).

use std::{
    collections::{BTreeSet, HashMap},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use kafka_protocol::{
    ResponseError,
    messages::{
        MetadataRequest, MetadataResponse, TopicName,
        metadata_request::MetadataRequestTopic,
        metadata_response::{MetadataResponseBroker, MetadataResponsePartition, MetadataResponseTopic},
    },
    protocol::StrBytes,
};
use millrace_cluster::{
    controller::{ControllerError, topics},
    metadata::TopicImage,
};
use uuid::Uuid;

use crate::{
    coordinator::controller::CaughtUp,
    endpoints::Endpoints,
    kafka::{
        connection::Peer,
        create,
        errors::Failure,
        operations::{self, OF_CLUSTERS, OF_TOPICS},
        repeats,
        topics::{catch_up, view_for},
    },
    node::{Node, OFFSETS_TOPIC, View},
};

/// Longest that a first answer waits; then it says what this node knows.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often it is looked whether somebody was elected.
const LOOK: Duration = Duration::from_millis(5);

/// Handles a request.
pub async fn handle(node: &Rc<Node>, version: i16, peer: &Peer, request: MetadataRequest) -> MetadataResponse {
    // Version 0 means all topics by an empty list, later ones by null.
    let all = match &request.topics {
        None => true,
        Some(topics) => version == 0 && topics.is_empty(),
    };
    let may_create =
        (version < 4 || request.allow_auto_topic_creation) && node.shared.settings.flag("auto.create.topics.enable");
    let mut wanted = request.topics.unwrap_or_default();
    repeats::leave_out(&mut wanted, |t| (t.name.clone(), t.topic_id));
    let named = wanted
        .iter()
        .map(|t| (t.name.as_ref().map_or("", |n| n.as_str()), t.topic_id));
    let until = Instant::now() + PATIENCE;
    let may_wait = peer.has_only_come && hear_all(node, until).await;
    let mut view = match peer.has_only_come {
        true => node.view(),
        false => view_for(node, named).await,
    };
    let mut refused = HashMap::new();
    if may_create && !all {
        let missing: Vec<String> = wanted
            .iter()
            .filter(|t| t.topic_id.is_nil())
            .filter_map(|t| t.name.as_ref().map(|n| n.to_string()))
            .filter(|name| view.image.topic(name).is_none() && topics::check_name(name).is_ok())
            .collect();
        if !missing.is_empty() {
            refused = create::automatically(node, missing).await.into_iter().collect();
            view = node.view();
        }
    }
    while may_wait && Instant::now() < until && !node.is_stopping() && awaits_election(node, &view, &wanted, all) {
        node.host_sleep(LOOK).await;
        view = node.view();
    }
    let endpoints = node.endpoints();
    let suspects = node.suspects.borrow().clone();
    let (of_topics, of_cluster) = (
        request.include_topic_authorized_operations,
        request.include_cluster_authorized_operations,
    );
    let mut topics: Vec<MetadataResponseTopic> = if all {
        view.image
            .topics()
            .map(|t| describe(&view, &endpoints, &suspects, t, version))
            .collect()
    } else {
        wanted
            .into_iter()
            .map(|topic| one(&view, &endpoints, &suspects, topic, version, may_create, &refused))
            .collect()
    };
    for topic in topics.iter_mut().filter(|_| version >= 8) {
        topic.topic_authorized_operations = operations::told(of_topics, OF_TOPICS);
    }
    let departures = node.departures.borrow();
    let now = Instant::now();
    let told = endpoints.of_cluster(&view.image, |broker| departures.tell_of(broker, &suspects, now));
    let brokers = told.into_iter().map(|(e, rack)| {
        let mut broker = MetadataResponseBroker::default()
            .with_node_id(e.id.into())
            .with_host(StrBytes::from_string(e.host))
            .with_port(i32::from(e.port));
        if version >= 1 {
            broker.rack = rack.map(StrBytes::from_string);
        }
        broker
    });
    let mut response = MetadataResponse::default()
        .with_brokers(brokers.collect())
        .with_controller_id(endpoints.coordinator().id.into())
        .with_topics(topics);
    if version >= 2 {
        response.cluster_id = Some(StrBytes::from_string(view.image.cluster_id.clone()));
    }
    if (8..=10).contains(&version) {
        response.cluster_authorized_operations = operations::told(of_cluster, OF_CLUSTERS);
    }
    response
}

/// Waits until this node knows all that was agreed on before; false if it did not hear that by then, or there is no quorum to
/// say it.
async fn hear_all(node: &Rc<Node>, until: Instant) -> bool {
    let heard = async {
        loop {
            match catch_up(node).await {
                CaughtUp::Yes => return true,
                CaughtUp::NoQuorum => return false,
                CaughtUp::NotInTime => {}
            }
        }
    };
    let patience = async {
        node.host_sleep(until.saturating_duration_since(Instant::now())).await;
        false
    };
    futures_lite::future::or(heard, patience).await
}

/// Whether some partition asked for is led by a node that seems to have died.
fn awaits_election(node: &Node, view: &Arc<View>, wanted: &[MetadataRequestTopic], all: bool) -> bool {
    let suspects = node.suspects.borrow();
    if suspects.is_empty() {
        return false;
    }
    let awaits = |t: &TopicImage| t.partitions.iter().any(|p| suspects.contains(&p.leader));
    if all {
        return view.image.topics().any(|t| awaits(t));
    }
    let named = |t: &MetadataRequestTopic| match &t.name {
        Some(name) if t.topic_id.is_nil() => view.image.topic(name),
        _ => view.image.topic_by_id(&t.topic_id),
    };
    wanted.iter().filter_map(named).any(|t| awaits(t))
}

fn one(
    view: &View,
    endpoints: &Endpoints,
    suspects: &BTreeSet<i32>,
    topic: MetadataRequestTopic,
    version: i16,
    may_create: bool,
    refused: &HashMap<String, Failure>,
) -> MetadataResponseTopic {
    let failed = |code: i16, name: Option<TopicName>, id: Uuid| {
        let mut t = MetadataResponseTopic::default().with_error_code(code).with_name(name);
        if version >= 10 {
            t.topic_id = id;
        }
        t
    };
    if !topic.topic_id.is_nil() {
        return match view.image.topic_by_id(&topic.topic_id) {
            Some(image) => describe(view, endpoints, suspects, image, version),
            None => {
                // Before version 12 the name may not be null.
                let name = (version < 12).then(TopicName::default);
                failed(ResponseError::UnknownTopicId.code(), name, topic.topic_id)
            }
        };
    }
    let name = topic.name.unwrap_or_default();
    if let Some(image) = view.image.topic(&name) {
        return describe(view, endpoints, suspects, image, version);
    }
    let code = match refused.get(name.as_str()) {
        Some(failure) => failure.code(),
        None => match topics::check_name(&name) {
            Err(ControllerError::InvalidTopic { .. }) => ResponseError::InvalidTopicException.code(),
            _ if may_create => ResponseError::LeaderNotAvailable.code(),
            _ => ResponseError::UnknownTopicOrPartition.code(),
        },
    };
    failed(code, Some(name), Uuid::nil())
}

fn describe(
    view: &View,
    endpoints: &Endpoints,
    suspects: &BTreeSet<i32>,
    image: &TopicImage,
    version: i16,
) -> MetadataResponseTopic {
    let partitions = image
        .partitions
        .iter()
        .enumerate()
        .map(|(index, p)| {
            let broker = endpoints.naming(view, image.id, index as u32);
            // Nobody, rather than one who is about to be followed by another: clients ask again soon then.
            let leader = if suspects.contains(&p.leader) { -1 } else { p.leader };
            let mut partition = MetadataResponsePartition::default()
                .with_partition_index(index as i32)
                .with_leader_id(broker(&leader))
                .with_replica_nodes(p.replicas.iter().map(&broker).collect())
                .with_isr_nodes(p.isr.iter().map(&broker).collect());
            if leader == -1 {
                partition.error_code = ResponseError::LeaderNotAvailable.code();
            }
            if version >= 7 {
                partition.leader_epoch = p.leader_epoch;
            }
            partition
        })
        .collect();
    let mut topic = MetadataResponseTopic::default()
        .with_name(Some(TopicName(StrBytes::from_string(image.name.clone()))))
        .with_is_internal(image.name == OFFSETS_TOPIC)
        .with_partitions(partitions);
    if version >= 10 {
        topic.topic_id = image.id;
    }
    topic
}
