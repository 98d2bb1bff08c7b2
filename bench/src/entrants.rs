//! Who is compared, under what settings, and which two make a fair pair.

use std::path::PathBuf;

use crate::{
    Outcome,
    target::{Target, kafka},
};

/// What is compared.
#[derive(clap::Args)]
pub struct Choice {
    /// Folder that keeps Kafka's jars.
    #[arg(long, default_value = "target/bench-cache")]
    cache: PathBuf,
    /// Millrace's program [default: the one beside this]
    #[arg(long)]
    millrace: Option<PathBuf>,
    /// Version of Apache Kafka.
    #[arg(long, default_value = "4.3.1")]
    kafka_version: String,
    /// Leave Apache Kafka out.
    #[arg(long)]
    no_kafka: bool,
    /// Another broker that speaks the Kafka protocol and runs already, NAME=HOST:PORT.
    #[arg(long = "target")]
    targets: Vec<String>,
    /// Kafka's heap, and Millrace's memory, of each node.
    #[arg(long, default_value = "1g")]
    memory: String,
    /// Nodes of each side. With several, every partition has a replica on up to three of them, and
    /// acknowledgements need two (min.insync.replicas).
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=9))]
    nodes: u16,
}

impl Choice {
    /// Replicas of each partition, where it is for the cluster to say and not for the workload.
    pub fn replicas(&self) -> Option<i16> {
        self.is_cluster().then(|| self.nodes.min(3).cast_signed())
    }

    fn is_cluster(&self) -> bool {
        self.nodes > 1
    }
}

/// How Millrace is called in reports where every core has a shard and is a broker to its clients.
const CORES: &str = "Millrace, core endpoints";
/// How the floor is called in reports.
const FLOOR: &str = "Floor";
/// How it is called where it does not flush.
const FLOOR_WRITTEN: &str = "Floor, written";

/// A target under a setting.
pub struct Variant {
    /// In reports.
    pub name: String,
    /// Settings of its topics.
    pub configs: Vec<(String, String)>,
}

/// A target with its variants.
pub struct Entrant {
    /// Of its folder.
    pub name: String,
    /// What is started.
    pub target: Target,
    /// Driven one after the other.
    pub variants: Vec<Variant>,
}

/// All of them, in the order of a round.
///
/// # Errors
/// Kafka cannot be fetched, or a target is not said as it should be.
pub fn all(choice: &Choice) -> Outcome<Vec<Entrant>> {
    let entrant = |name: &str, target, variants| Entrant {
        name: name.into(),
        target,
        variants,
    };
    let variant = |name: &str, flush: Option<&str>| {
        let mut configs = Vec::new();
        if choice.is_cluster() {
            configs.push(("min.insync.replicas".to_owned(), "2".to_owned()));
        }
        if let Some(flush) = flush {
            configs.push(("flush.messages".to_owned(), flush.to_owned()));
        }
        Variant {
            name: name.into(),
            configs,
        }
    };
    let never = i64::MAX.to_string();
    let nodes = usize::from(choice.nodes);
    let binary = match &choice.millrace {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.with_file_name("millrace"),
    };
    let millrace = |core_endpoints| Target::Millrace {
        binary: binary.clone(),
        memory: format!("{}iB", choice.memory.to_uppercase()),
        core_endpoints,
        nodes,
    };
    let mut all = vec![entrant(
        "millrace",
        millrace(false),
        vec![
            variant("Millrace", None),
            variant("Millrace, relaxed flush", Some(&never)),
        ],
    )];
    if !choice.is_cluster() {
        all.push(entrant("millrace-cores", millrace(true), vec![variant(CORES, None)]));
        all.push(entrant(
            "floor",
            Target::Floor,
            vec![variant(FLOOR, None), variant(FLOOR_WRITTEN, Some(&never))],
        ));
    }
    if !choice.no_kafka {
        let target = Target::Kafka {
            lib: kafka::fetch(&choice.cache, &choice.kafka_version)?,
            version: choice.kafka_version.clone(),
            heap: choice.memory.clone(),
            nodes,
        };
        let variants = vec![variant("Kafka", None), variant("Kafka, flushing", Some("1"))];
        all.push(entrant("kafka", target, variants));
    }
    for given in &choice.targets {
        let (name, address) = given.split_once('=').ok_or("--target takes NAME=HOST:PORT")?;
        let target = Target::External {
            address: address.into(),
        };
        all.push(entrant(name, target, vec![variant(name, None)]));
    }
    Ok(all)
}

/// Which variants are compared, and what makes the pair fair.
pub fn pairs(choice: &Choice) -> Vec<(String, String, String)> {
    let pair = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned());
    let alone = !choice.is_cluster();
    let kafka = !choice.no_kafka;
    let mut pairs = Vec::new();
    if alone {
        let distance = "the distance to what the machine can do for this client, with the same durability";
        pairs.extend([
            pair("Millrace", FLOOR, distance),
            pair(CORES, FLOOR, distance),
            pair("Millrace, relaxed flush", FLOOR_WRITTEN, distance),
            pair(
                CORES,
                "Millrace",
                "a shard on every core, and clients that connect to the one that owns a partition",
            ),
        ]);
    }
    if kafka {
        pairs.extend([
            pair(
                "Millrace",
                "Kafka",
                "both at their defaults: Millrace flushes before it acknowledges, Kafka does not",
            ),
            pair(
                "Millrace",
                "Kafka, flushing",
                "equal durability: both flush before they acknowledge",
            ),
            pair(
                "Millrace, relaxed flush",
                "Kafka",
                "equal durability: neither flushes before it acknowledges",
            ),
        ]);
    }
    if kafka && alone {
        pairs.extend([
            pair(
                CORES,
                "Kafka",
                "both flush as they do by default; a shard on every core, and each a broker to clients",
            ),
            pair(
                FLOOR,
                "Kafka",
                "what can be reached at all: a server that keeps nothing, and flushes, against Kafka, which does not flush",
            ),
            pair(
                FLOOR_WRITTEN,
                "Kafka",
                "what can be reached at all without a flush on either side",
            ),
        ]);
    }
    for given in &choice.targets {
        if let Some((name, _)) = given.split_once('=') {
            pairs.push(pair("Millrace", name, "each at its defaults"));
        }
    }
    pairs
}
