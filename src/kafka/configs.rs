//! Settings as the admin APIs show and name them.

use kafka_protocol::{ResponseError, protocol::StrBytes};
use millrace_cluster::metadata::{ConfigResource, Image};

use super::errors::Failure;
use crate::{
    config::{ENTRIES, Entry, Kind, Scope, Settings, Source},
    endpoints::node_of,
    node::Node,
};

/// Kafka's resource types.
pub const TOPIC: i8 = 2;
/// Kafka's resource types.
pub const BROKER: i8 = 4;
/// Kafka's resource types; accepted and empty, there are no loggers to set.
pub const BROKER_LOGGER: i8 = 8;

/// DescribeConfigs' source: set on the topic.
pub const SOURCE_TOPIC: i8 = 1;
/// Set on the broker while it runs.
pub const SOURCE_DYNAMIC_BROKER: i8 = 2;
/// File, environment or command line.
pub const SOURCE_STATIC: i8 = 4;
/// Nobody set it.
pub const SOURCE_DEFAULT: i8 = 5;

/// A setting in force.
#[derive(Clone, Debug)]
pub struct Effective {
    /// Which.
    pub entry: &'static Entry,
    /// Its value.
    pub value: String,
    /// Whence.
    pub source: i8,
    /// Everything that could have given it, strongest first: name, value, source.
    pub synonyms: Vec<(&'static str, String, i8)>,
}

/// All settings of a topic.
#[must_use]
pub fn topic_entries(settings: &Settings, image: &Image, resource: &ConfigResource) -> Vec<Effective> {
    ENTRIES
        .iter()
        .filter_map(|entry| {
            let Scope::Topic { broker } = entry.scope else {
                return None;
            };
            let mut synonyms = Vec::new();
            if let Some(value) = image.config(resource, entry.name) {
                synonyms.push((entry.name, value.to_owned(), SOURCE_TOPIC));
            }
            if !broker.is_empty() {
                if settings.source(broker) == Source::Static {
                    synonyms.push((broker, settings.get(broker).to_owned(), SOURCE_STATIC));
                }
                synonyms.push((broker, entry.default.to_owned(), SOURCE_DEFAULT));
            }
            let (value, source) = match synonyms.first() {
                Some((_, value, source)) => (value.clone(), *source),
                None => (entry.default.to_owned(), SOURCE_DEFAULT),
            };
            Some(Effective {
                entry,
                value,
                source,
                synonyms,
            })
        })
        .collect()
}

/// What Kafka's tools look for under Kafka's names and ours say under others.
static DERIVED: [Entry; 4] = [
    derived(
        "advertised.listeners",
        "Address told to clients; the setting `advertise` gives it.",
    ),
    derived("listeners", "Address listened on; the setting `kafka.listen` gives it."),
    derived("log.dirs", "Folder of all data; the setting `data.dir` gives it."),
    derived("broker.id", "Number of this broker; the setting `node.id` gives it."),
];

const fn derived(name: &'static str, doc: &'static str) -> Entry {
    Entry {
        name,
        kind: Kind::Str,
        default: "",
        scope: Scope::Broker { dynamic: false },
        doc,
    }
}

/// Settings of this broker under Kafka's own names.
#[must_use]
pub fn derived_entries(node: &Node) -> Vec<Effective> {
    let endpoints = node.endpoints();
    let listeners = endpoints
        .all()
        .iter()
        .map(|e| format!("PLAINTEXT://{}:{}", e.host, e.port));
    let values = [
        listeners.collect::<Vec<_>>().join(","),
        format!("PLAINTEXT://{}", node.shared.settings.get("kafka.listen")),
        node.shared.data_dir.display().to_string(),
        node.shared.node_id.to_string(),
    ];
    DERIVED
        .iter()
        .zip(values)
        .map(|(entry, value)| Effective {
            entry,
            value: value.clone(),
            source: SOURCE_STATIC,
            synonyms: vec![(entry.name, value, SOURCE_STATIC)],
        })
        .collect()
}

/// All settings of this broker.
#[must_use]
pub fn broker_entries(settings: &Settings, image: &Image, node_id: i32) -> Vec<Effective> {
    ENTRIES
        .iter()
        .filter(|e| matches!(e.scope, Scope::Broker { .. }))
        .map(|entry| {
            let mut synonyms = Vec::new();
            for resource in [ConfigResource::Broker(Some(node_id)), ConfigResource::Broker(None)] {
                if let Some(value) = image.config(&resource, entry.name) {
                    synonyms.push((entry.name, value.to_owned(), SOURCE_DYNAMIC_BROKER));
                }
            }
            if settings.source(entry.name) == Source::Static {
                synonyms.push((entry.name, settings.get(entry.name).to_owned(), SOURCE_STATIC));
            }
            synonyms.push((entry.name, settings.default_of(entry.name).to_owned(), SOURCE_DEFAULT));
            let (_, value, source) = synonyms[0].clone();
            Effective {
                entry,
                value,
                source,
                synonyms,
            }
        })
        .collect()
}

/// Why a resource that a request names more than once is not changed.
#[must_use]
pub fn refuse_twice() -> Failure {
    Failure::new(ResponseError::InvalidRequest, "Each resource must appear at most once.")
}

/// The resource that a request names.
///
/// # Errors
/// INVALID_REQUEST for a type or broker that is not served here.
pub fn resource(kind: i8, name: &StrBytes, node: &Node, for_change: bool) -> Result<ConfigResource, Failure> {
    let invalid = |reason: String| Failure::new(ResponseError::InvalidRequest, reason);
    let is_known = |id: i32| node.view().image.broker(id).is_some();
    match kind {
        TOPIC if name.is_empty() => Err(invalid("Default topic resources are not allowed.".into())),
        TOPIC => {
            millrace_cluster::controller::topics::check_name(name)?;
            Ok(ConfigResource::Topic(name.to_string()))
        }
        BROKER if name.is_empty() => Ok(ConfigResource::Broker(None)),
        BROKER | BROKER_LOGGER => match name.parse::<i32>() {
            // A core's id means the node: settings are the node's.
            Ok(id) if node.endpoints().is_ours(id) => Ok(ConfigResource::Broker(Some(node.shared.node_id))),
            // What others were started with only they know; what is set while they run everybody does.
            Ok(id) if for_change && is_known(node_of(id, is_known)) => {
                Ok(ConfigResource::Broker(Some(node_of(id, is_known))))
            }
            Ok(id) => Err(invalid(format!(
                "Unexpected broker id, expected {} but received {id}",
                node.shared.node_id
            ))),
            Err(_) => Err(invalid(format!("Broker id must be an integer, but it is: {name}"))),
        },
        other => Err(invalid(format!("Unsupported resource type {other}"))),
    }
}
