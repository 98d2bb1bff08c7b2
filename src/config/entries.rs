//! The table of all settings.

/// Type of a value, with its bounds. DescribeConfigs reports it.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// 32 bits, with the smallest and largest value allowed.
    Int(i64, i64),
    /// 64 bits, likewise.
    Long(i64, i64),
    /// 32 bits: one value apart, or from the smallest to the largest.
    IntOr(i64, i64, i64),
    /// `true` or `false`, in any case.
    Bool,
    /// Text.
    Str,
    /// A number between 0 and 1.
    Ratio,
    /// Comma-separated.
    List,
    /// One of these.
    OneOf(&'static [&'static str]),
    /// Some of these, or none of them; comma-separated.
    ListOf(&'static [&'static str]),
    /// Replicas as PARTITION:BROKER, comma-separated, or `*` for all.
    Replicas,
}

impl Kind {
    /// Kafka's number for the type (ConfigDef.Type in DescribeConfigs, KIP-569).
    #[must_use]
    pub fn code(self) -> i8 {
        match self {
            Self::Bool => 1,
            Self::Str | Self::OneOf(_) => 2,
            Self::Int(..) | Self::IntOr(..) => 3,
            Self::Long(..) => 5,
            Self::Ratio => 6,
            Self::List | Self::ListOf(_) | Self::Replicas => 7,
        }
    }

    /// Whether values are lists.
    #[must_use]
    pub fn is_list(self) -> bool {
        matches!(self, Self::List | Self::ListOf(_) | Self::Replicas)
    }

    /// Reads a value as Kafka's `ConfigDef` does, and gives it in the one form that is kept: without spaces around it, numbers and
    /// booleans as this program writes them, no element of a set twice.
    fn read(self, name: &str, value: &str) -> Result<String, String> {
        let text = value.trim();
        let invalid = |expected: String| Err(format!("Invalid value {value} for configuration {name}: {expected}"));
        let one_of = |allowed: &[&str]| format!("String must be one of: {}", allowed.join(", "));
        match self {
            Self::Int(min, max) | Self::Long(min, max) => match text.parse::<i64>() {
                Ok(n) if n >= min && n <= max => Ok(n.to_string()),
                Ok(_) => invalid(format!("it must be between {min} and {max}")),
                Err(_) => invalid(format!("expected a whole number from {min} to {max}")),
            },
            Self::IntOr(other, min, max) => match text.parse::<i64>() {
                Ok(n) if n == other || (n >= min && n <= max) => Ok(n.to_string()),
                _ => invalid(format!("Value must be between {min} and {max} or equal to {other}")),
            },
            Self::Bool => match text.to_ascii_lowercase().as_str() {
                known @ ("true" | "false") => Ok(known.into()),
                _ => invalid("Expected value to be either true or false".into()),
            },
            Self::Ratio => match text.parse::<f64>() {
                Ok(n) if (0.0..=1.0).contains(&n) => Ok(text.into()),
                _ => invalid("expected a number from 0 to 1".into()),
            },
            Self::OneOf(allowed) if !allowed.contains(&text) => invalid(one_of(allowed)),
            Self::Str | Self::OneOf(_) => Ok(text.into()),
            Self::List => Ok(elements(text).collect::<Vec<_>>().join(",")),
            Self::ListOf(allowed) => {
                let mut set = Vec::new();
                for element in elements(text) {
                    if element.is_empty() {
                        return Err(format!("Configuration '{name}' values must not be empty."));
                    }
                    if !allowed.contains(&element) {
                        return invalid(one_of(allowed));
                    }
                    if !set.contains(&element) {
                        set.push(element);
                    }
                }
                Ok(set.join(","))
            }
            Self::Replicas => {
                let is_number = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
                let is_replica = |s: &str| s.split_once(':').is_some_and(|(p, b)| is_number(p) && is_number(b));
                let list: Vec<&str> = elements(text).filter(|s| !s.is_empty()).collect();
                if list == ["*"] || list.iter().all(|s| is_replica(s)) {
                    Ok(list.join(","))
                } else {
                    invalid(
                        "it must be the literal '*' or a list of replicas in the following format: \
                         [partitionId]:[brokerId],[partitionId]:[brokerId],..."
                            .into(),
                    )
                }
            }
        }
    }
}

/// The elements of a list; none of an empty text.
fn elements(list: &str) -> impl Iterator<Item = &str> {
    list.split(',').map(str::trim).skip(usize::from(list.is_empty()))
}

/// What a setting is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// Read at the start; `dynamic` ones can be changed with AlterConfigs.
    Broker {
        /// Takes effect without a restart.
        dynamic: bool,
    },
    /// Of a topic, with the broker setting that is its default (may be the same name).
    Topic {
        /// Where its default comes from.
        broker: &'static str,
    },
}

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Kafka's name, or ours.
    pub name: &'static str,
    /// Type and bounds.
    pub kind: Kind,
    /// Unless set.
    pub default: &'static str,
    /// Of what.
    pub scope: Scope,
    /// What it does, one sentence or two.
    pub doc: &'static str,
}

impl Entry {
    /// Reads a value, and gives it in the form that is kept.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn read(&self, value: &str) -> Result<String, String> {
        let read = self.kind.read(self.name, value)?;
        match NOT_THERE_YET.iter().find(|(name, _, _)| *name == self.name) {
            Some((_, asked, why)) if read.split(',').any(|element| element == *asked) => Err((*why).to_owned()),
            _ => Ok(read),
        }
    }
}

/// Settings, and values of them, that cannot be taken: to ignore them would change what is kept or seen.
const NOT_THERE_YET: &[(&str, &str, &str)] = &[
    ("cleanup.policy", "compact", NO_COMPACTION),
    ("log.cleanup.policy", "compact", NO_COMPACTION),
    (
        "remote.storage.enable",
        "true",
        "Tiered storage is not there yet: a topic cannot be configured with remote log storage \
         (remote.storage.enable=true).",
    ),
];

const NO_COMPACTION: &str = "cleanup.policy=compact is not supported yet: records would be kept that compaction should remove, \
                             or removed that it should keep. Use cleanup.policy=delete with retention.ms.";

const MAX: i64 = i64::MAX;
const INT: i64 = i32::MAX as i64;

const fn broker(name: &'static str, kind: Kind, default: &'static str, doc: &'static str) -> Entry {
    Entry {
        name,
        kind,
        default,
        scope: Scope::Broker { dynamic: false },
        doc,
    }
}

const fn dynamic(name: &'static str, kind: Kind, default: &'static str, doc: &'static str) -> Entry {
    Entry {
        name,
        kind,
        default,
        scope: Scope::Broker { dynamic: true },
        doc,
    }
}

const fn topic(
    name: &'static str,
    broker: &'static str,
    kind: Kind,
    default: &'static str,
    doc: &'static str,
) -> Entry {
    Entry {
        name,
        kind,
        default,
        scope: Scope::Topic { broker },
        doc,
    }
}

const CODECS: &[&str] = &["producer", "uncompressed", "gzip", "snappy", "lz4", "zstd"];
const POLICIES: &[&str] = &["compact", "delete"];
const TIMES: &[&str] = &["CreateTime", "LogAppendTime"];

/// Every setting.
pub const ENTRIES: &[Entry] = &[
    broker(
        "data.dir",
        Kind::Str,
        "millrace-data",
        "Folder of all data; made if it is not there.",
    ),
    broker(
        "kafka.listen",
        Kind::Str,
        "127.0.0.1:9092",
        "Address that Kafka clients connect to; port 0 picks a free one and prints it.",
    ),
    broker(
        "advertise",
        Kind::Str,
        "",
        "Address told to clients, if it is not the one listened on.",
    ),
    broker(
        "cores",
        Kind::Int(0, 1024),
        "0",
        "Shards, each on a core of its own; 0 takes all cores that this process may use, by affinity and CPU quota, but one, and \
         at least one. Nodes of one machine begin behind each other, by their ids.",
    ),
    broker(
        "memory",
        Kind::Str,
        "1GiB",
        "Memory for batches, caches and requests, of all shards together; at least 64MiB. Where this process may use less than \
         2GiB, by its cgroup or because the host has no more, the default is half of that.",
    ),
    broker(
        "node.id",
        Kind::Int(0, INT),
        "0",
        "Number of this broker in the cluster; kept in the data folder.",
    ),
    broker(
        "cluster.listen",
        Kind::Str,
        "",
        "Address that other nodes reach this one at, empty for a node alone: UDP on its port for the first shard and on those behind it for \
         the others, and TCP on its port, by which a death is noticed.",
    ),
    broker(
        "peers",
        Kind::List,
        "",
        "The nodes that a new cluster begins with, this one among them, as ID@HOST:PORT of their cluster.listen.",
    ),
    broker(
        "cluster.tls.ca",
        Kind::Str,
        "",
        "File of the cluster CA's certificate (PEM). Without it, and with all peers on this machine, a development CA is used.",
    ),
    broker(
        "cluster.tls.cert",
        Kind::Str,
        "",
        "File of this node's certificate (PEM), made by `millrace cluster issue`.",
    ),
    broker("cluster.tls.key", Kind::Str, "", "File of this node's key (PEM)."),
    broker(
        "cluster.tls.crl",
        Kind::Str,
        "",
        "File of the cluster CA's list of revoked certificates (PEM), made by `millrace cluster revoke`; read at start.",
    ),
    broker(
        "controller.quorum.election.timeout.ms",
        Kind::Int(100, 60_000),
        "300",
        "Silence of the metadata quorum's leader after which another is elected, at the least; twice that at the most.",
    ),
    broker(
        "broker.session.timeout.ms",
        Kind::Int(100, 600_000),
        "500",
        "Silence of a broker after which others lead what it led.",
    ),
    broker(
        "replica.lag.time.max.ms",
        Kind::Int(100, 3_600_000),
        "10000",
        "A follower that has not caught up for so long leaves the ISR.",
    ),
    broker(
        "auto.leader.rebalance.enable",
        Kind::Bool,
        "true",
        "Preferred leaders lead again once they are in sync.",
    ),
    broker(
        "leader.imbalance.check.interval.seconds",
        Kind::Int(1, 1_000_000),
        "300",
        "How often that is looked at.",
    ),
    broker(
        "auto.core.rebalance.enable",
        Kind::Bool,
        "true",
        "Partitions go to another core of this broker where one has lasting more to do than another.",
    ),
    broker(
        "core.imbalance.check.interval.seconds",
        Kind::Int(1, 1_000_000),
        "30",
        "How often that is looked at; two looks must agree.",
    ),
    broker(
        "replica.selector.class",
        Kind::OneOf(&["", "org.apache.kafka.common.replica.RackAwareReplicaSelector"]),
        "",
        "With the rack-aware selector, consumers that name their rack (client.rack) are sent to a replica in sync there.",
    ),
    broker(
        "broker.rack",
        Kind::Str,
        "",
        "Where this broker stands; told to clients.",
    ),
    broker(
        "spin.us",
        Kind::Int(0, 1_000_000),
        "0",
        "Microseconds that a shard spins before it sleeps; costs a core, saves wake-ups.",
    ),
    broker(
        "journal.bytes",
        Kind::Long(1 << 20, 1 << 40),
        "134217728",
        "Size of each shard's journal; bounds unwritten batches and the time of recovery.",
    ),
    broker(
        "disk.free.bytes.min",
        Kind::Long(0, MAX),
        "268435456",
        "Free space below which clients' appends are refused; a quarter of it below which committed offsets are.",
    ),
    broker(
        "socket.request.max.bytes",
        Kind::Int(1024, INT),
        "104857600",
        "Largest request; larger ones close the connection.",
    ),
    broker(
        "core.endpoints",
        Kind::Bool,
        "false",
        "Tells clients of each core as a broker of its own, on the ports that follow kafka.listen (any, if its port is 0), so that \
         they connect straight to the core that owns a partition. The first core has the broker id node.id, the next ones \
         node.id + 100000, + 200000, and so on: admin tools see as many brokers.",
    ),
    broker(
        "max.connections",
        Kind::Int(1, INT),
        "10000",
        "Connections of all shards together, fewer where `ulimit -Hn` does not allow so many; further ones are closed at once.",
    ),
    broker(
        "connections.max.idle.ms",
        Kind::Int(-1, MAX),
        "600000",
        "Connections that nothing comes or goes over for so long are closed, -1 for never; after 30 s those whose peer has sent half a \
         request, or reads no answer.",
    ),
    broker(
        "max.inflight.requests.per.connection",
        Kind::Int(1, 10_000),
        "100",
        "Produce requests of one connection that are worked on at once; then its socket is not read.",
    ),
    broker(
        "log.segment.bytes",
        Kind::Int(1 << 14, INT),
        "1073741824",
        "Default of segment.bytes.",
    ),
    broker("log.roll.ms", Kind::Long(1, MAX), "604800000", "Default of segment.ms."),
    broker(
        "log.retention.ms",
        Kind::Long(-1, MAX),
        "604800000",
        "Default of retention.ms.",
    ),
    broker(
        "log.retention.bytes",
        Kind::Long(i64::MIN, MAX),
        "-1",
        "Default of retention.bytes.",
    ),
    broker(
        "log.flush.interval.messages",
        Kind::Long(1, MAX),
        "1",
        "Default of flush.messages.",
    ),
    broker(
        "log.flush.interval.ms",
        Kind::Long(0, MAX),
        "9223372036854775807",
        "Default of flush.ms.",
    ),
    broker(
        "message.max.bytes",
        Kind::Int(0, INT),
        "1048588",
        "Default of max.message.bytes.",
    ),
    broker(
        "compression.type",
        Kind::OneOf(CODECS),
        "producer",
        "Default of the topic setting of this name.",
    ),
    broker(
        "compression.gzip.level",
        Kind::IntOr(-1, 1, 9),
        "-1",
        "Default of the topic setting of this name.",
    ),
    broker(
        "compression.lz4.level",
        Kind::Int(1, 17),
        "9",
        "Default of the topic setting of this name.",
    ),
    broker(
        "compression.zstd.level",
        Kind::Int(-131_072, 22),
        "3",
        "Default of the topic setting of this name.",
    ),
    broker(
        "log.message.timestamp.type",
        Kind::OneOf(TIMES),
        "CreateTime",
        "Default of message.timestamp.type.",
    ),
    broker(
        "log.message.timestamp.before.max.ms",
        Kind::Long(0, MAX),
        "9223372036854775807",
        "Default of message.timestamp.before.max.ms.",
    ),
    broker(
        "log.message.timestamp.after.max.ms",
        Kind::Long(0, MAX),
        "3600000",
        "Default of message.timestamp.after.max.ms.",
    ),
    broker(
        "log.cleanup.policy",
        Kind::ListOf(POLICIES),
        "delete",
        "Default of cleanup.policy.",
    ),
    broker(
        "num.partitions",
        Kind::Int(1, INT),
        "1",
        "Partitions of a topic created without a count.",
    ),
    broker(
        "default.replication.factor",
        Kind::Int(1, 32767),
        "1",
        "Replicas of a topic created without a count.",
    ),
    broker(
        "min.insync.replicas",
        Kind::Int(1, INT),
        "1",
        "Default of the topic setting of this name.",
    ),
    broker(
        "auto.create.topics.enable",
        Kind::Bool,
        "true",
        "A Metadata request that allows it creates topics it names.",
    ),
    broker("delete.topic.enable", Kind::Bool, "true", "Topics may be deleted."),
    broker(
        "group.min.session.timeout.ms",
        Kind::Int(1, INT),
        "6000",
        "Smallest session timeout a consumer may ask for.",
    ),
    broker(
        "group.max.session.timeout.ms",
        Kind::Int(1, INT),
        "1800000",
        "Largest session timeout a consumer may ask for.",
    ),
    broker(
        "group.initial.rebalance.delay.ms",
        Kind::Int(0, INT),
        "3000",
        "How long the first rebalance of an empty group waits for more members.",
    ),
    broker(
        "group.max.size",
        Kind::Int(1, INT),
        "2147483647",
        "Most members of a group.",
    ),
    broker(
        "offset.metadata.max.bytes",
        Kind::Int(0, INT),
        "4096",
        "Longest note in an offset commit.",
    ),
    broker(
        "offsets.retention.minutes",
        Kind::Int(1, INT),
        "10080",
        "Offsets of a group without members are kept this long.",
    ),
    broker(
        "offsets.topic.replication.factor",
        Kind::Int(1, 32767),
        "3",
        "Replicas of __consumer_offsets, or as many as there are brokers; it gets those that it lacks when there are more.",
    ),
    broker(
        "offsets.topic.num.partitions",
        Kind::Int(1, 10_000),
        "50",
        "Partitions of __consumer_offsets; fixed once it exists.",
    ),
    broker(
        "offsets.topic.segment.bytes",
        Kind::Int(1 << 14, INT),
        "104857600",
        "Its `segment.bytes` when it is created: what is no longer needed of it goes by the segment.",
    ),
    broker(
        "producer.id.expiration.ms",
        Kind::Int(1, INT),
        "86400000",
        "A producer that has not written for so long is forgotten.",
    ),
    broker(
        "fetch.max.bytes",
        Kind::Int(1024, INT),
        "1048576",
        "Most bytes of one fetch answer, but for a first batch that is larger. Small, so that readers of a backlog do not hold \
         up the core that producers wait for; partitions take turns.",
    ),
    broker(
        "max.incremental.fetch.session.cache.slots",
        Kind::Int(0, INT),
        "1000",
        "Fetch sessions kept (KIP-227); beyond them clients send full fetches.",
    ),
    broker(
        "decompress.max.bytes",
        Kind::Long(1 << 16, MAX),
        "134217728",
        "Most bytes that one batch may unpack to, where the broker has to unpack it.",
    ),
    broker(
        "log.retention.check.interval.ms",
        Kind::Long(1, MAX),
        "30000",
        "Pause between two looks for segments that retention deletes; in whole seconds, rounded up.",
    ),
    dynamic(
        "broker.draining",
        Kind::Bool,
        "false",
        "New replicas are put on other brokers; `millrace cluster drain` sets it.",
    ),
    dynamic(
        "broker.replaceable",
        Kind::Bool,
        "false",
        "Another data folder may take this broker's place, once; `millrace cluster replace-node` sets it.",
    ),
    dynamic(
        "leader.replication.throttled.rate",
        Kind::Long(1, MAX),
        "9223372036854775807",
        "Bytes a second that this broker sends to followers that are catching up, together.",
    ),
    dynamic(
        "follower.replication.throttled.rate",
        Kind::Long(1, MAX),
        "9223372036854775807",
        "Kept for reassignment tools: leaders bound what they send.",
    ),
    topic(
        "cleanup.policy",
        "log.cleanup.policy",
        Kind::ListOf(POLICIES),
        "delete",
        "What happens to old records: `delete` lets retention remove them, an empty list keeps all; compaction is not there yet.",
    ),
    topic(
        "compression.type",
        "compression.type",
        Kind::OneOf(CODECS),
        "producer",
        "Codec that batches are stored with; `producer` keeps them as they come.",
    ),
    topic(
        "compression.gzip.level",
        "compression.gzip.level",
        Kind::IntOr(-1, 1, 9),
        "-1",
        "Level of the batches that compression.type has packed anew; -1 is 6.",
    ),
    topic(
        "compression.lz4.level",
        "compression.lz4.level",
        Kind::Int(1, 17),
        "9",
        "Level of the batches that compression.type has packed anew; 9 is the fast one, as in Kafka.",
    ),
    topic(
        "compression.zstd.level",
        "compression.zstd.level",
        Kind::Int(-131_072, 22),
        "3",
        "Level of the batches that compression.type has packed anew.",
    ),
    topic(
        "flush.messages",
        "log.flush.interval.messages",
        Kind::Long(1, MAX),
        "1",
        "A flush is due after so many records; 1 is before every acknowledgement.",
    ),
    topic(
        "flush.ms",
        "log.flush.interval.ms",
        Kind::Long(0, MAX),
        "9223372036854775807",
        "A flush is due so long after an unflushed append.",
    ),
    topic(
        "max.message.bytes",
        "message.max.bytes",
        Kind::Int(0, INT),
        "1048588",
        "Largest record batch.",
    ),
    topic(
        "message.timestamp.type",
        "log.message.timestamp.type",
        Kind::OneOf(TIMES),
        "CreateTime",
        "Whose clock timestamps come from.",
    ),
    topic(
        "message.timestamp.before.max.ms",
        "log.message.timestamp.before.max.ms",
        Kind::Long(0, MAX),
        "9223372036854775807",
        "How far in the past a timestamp may lie.",
    ),
    topic(
        "message.timestamp.after.max.ms",
        "log.message.timestamp.after.max.ms",
        Kind::Long(0, MAX),
        "3600000",
        "How far in the future a timestamp may lie.",
    ),
    topic(
        "min.insync.replicas",
        "min.insync.replicas",
        Kind::Int(1, INT),
        "1",
        "Replicas that must be in sync for acks=all.",
    ),
    topic(
        "retention.bytes",
        "log.retention.bytes",
        Kind::Long(i64::MIN, MAX),
        "-1",
        "A partition is cut to this size; -1 for never.",
    ),
    topic(
        "retention.ms",
        "log.retention.ms",
        Kind::Long(-1, MAX),
        "604800000",
        "Records older than this go; -1 for never.",
    ),
    topic(
        "segment.bytes",
        "log.segment.bytes",
        Kind::Int(1 << 14, INT),
        "1073741824",
        "A segment is closed before it grows beyond this.",
    ),
    topic(
        "segment.ms",
        "log.roll.ms",
        Kind::Long(1, MAX),
        "604800000",
        "A segment is closed this long after its first append.",
    ),
    // Kafka has these; here there is nothing they could change (delays and sizes of files, compaction that is not there).
    topic(
        "delete.retention.ms",
        "",
        Kind::Long(0, MAX),
        "86400000",
        "Only of compacted topics, which are not there yet.",
    ),
    topic(
        "file.delete.delay.ms",
        "",
        Kind::Long(0, MAX),
        "60000",
        "Files are removed at once.",
    ),
    topic(
        "index.interval.bytes",
        "",
        Kind::Int(0, INT),
        "4096",
        "The index has one entry for 128 KiB.",
    ),
    topic(
        "max.compaction.lag.ms",
        "",
        Kind::Long(1, MAX),
        "9223372036854775807",
        "Only of compacted topics.",
    ),
    topic(
        "min.cleanable.dirty.ratio",
        "",
        Kind::Ratio,
        "0.5",
        "Only of compacted topics.",
    ),
    topic(
        "min.compaction.lag.ms",
        "",
        Kind::Long(0, MAX),
        "0",
        "Only of compacted topics.",
    ),
    topic(
        "preallocate",
        "",
        Kind::Bool,
        "false",
        "The journal is always prewritten.",
    ),
    topic(
        "errors.deadletterqueue.group.enable",
        "",
        Kind::Bool,
        "false",
        "Only of share groups, which are not there yet.",
    ),
    topic(
        "max.decompressed.message.bytes",
        "",
        Kind::Int(1, 2_147_483_639),
        "2147483639",
        "Most bytes that one batch may unpack to, if decompress.max.bytes does not allow less.",
    ),
    topic(
        "remote.copy.lag.ms",
        "",
        Kind::Long(-1, MAX),
        "0",
        "Only of topics with tiered storage.",
    ),
    topic(
        "remote.copy.lag.bytes",
        "",
        Kind::Long(-1, MAX),
        "-1",
        "Only of topics with tiered storage.",
    ),
    topic(
        "remote.storage.enable",
        "",
        Kind::Bool,
        "false",
        "Tiered storage is not there yet.",
    ),
    topic(
        "remote.log.copy.disable",
        "",
        Kind::Bool,
        "false",
        "Only of topics with tiered storage.",
    ),
    topic(
        "remote.log.delete.on.disable",
        "",
        Kind::Bool,
        "false",
        "Only of topics with tiered storage.",
    ),
    topic(
        "local.retention.ms",
        "",
        Kind::Long(-2, MAX),
        "-2",
        "Only of topics with tiered storage.",
    ),
    topic(
        "local.retention.bytes",
        "",
        Kind::Long(-2, MAX),
        "-2",
        "Only of topics with tiered storage.",
    ),
    topic(
        "segment.index.bytes",
        "",
        Kind::Int(4, INT),
        "10485760",
        "Index size follows the segment's.",
    ),
    topic(
        "segment.jitter.ms",
        "",
        Kind::Long(0, MAX),
        "0",
        "Segments are closed without jitter.",
    ),
    topic(
        "unclean.leader.election.enable",
        "",
        Kind::Bool,
        "false",
        "Where no replica in sync is left, one leads that lacks some of what was acknowledged; that is lost then.",
    ),
    topic(
        "leader.replication.throttled.replicas",
        "",
        Kind::Replicas,
        "",
        "Kept for reassignment tools: leader.replication.throttled.rate bounds all followers that catch up.",
    ),
    topic(
        "follower.replication.throttled.replicas",
        "",
        Kind::Replicas,
        "",
        "Kept for reassignment tools: leader.replication.throttled.rate bounds all followers that catch up.",
    ),
];

/// The entry of a broker setting.
#[must_use]
pub fn find_broker(name: &str) -> Option<&'static Entry> {
    ENTRIES
        .iter()
        .find(|e| e.name == name && matches!(e.scope, Scope::Broker { .. }))
}

/// The entry of a topic setting.
#[must_use]
pub fn find_topic(name: &str) -> Option<&'static Entry> {
    ENTRIES
        .iter()
        .find(|e| e.name == name && matches!(e.scope, Scope::Topic { .. }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_passes_its_own_check() {
        for entry in ENTRIES {
            assert_eq!(
                entry.read(entry.default).as_deref(),
                Ok(entry.default),
                "{}",
                entry.name
            );
            if let Scope::Topic { broker } = entry.scope
                && !broker.is_empty()
            {
                let of_broker = find_broker(broker).unwrap_or_else(|| panic!("{} names {broker}", entry.name));
                assert_eq!(of_broker.default, entry.default, "{}", entry.name);
            }
        }
    }

    #[test]
    fn values_are_read_as_kafka_reads_them() {
        // Answers of Kafka 4.4.0 to CreateTopics; what is kept of those it takes is what its DescribeConfigs says.
        for (name, value, kept) in [
            ("unclean.leader.election.enable", "True", Some("true")),
            ("preallocate", " FALSE ", Some("false")),
            ("preallocate", "yes", None),
            ("retention.ms", " 5 ", Some("5")),
            ("retention.ms", "+5", Some("5")),
            ("retention.ms", "-2", None),
            ("retention.ms", "", None),
            ("retention.bytes", "-7", Some("-7")),
            ("compression.type", " zstd ", Some("zstd")),
            ("compression.type", "Zstd", None),
            ("message.timestamp.type", "createtime", None),
            ("min.cleanable.dirty.ratio", "1e-1", Some("1e-1")),
            ("cleanup.policy", "", Some("")),
            ("cleanup.policy", "delete, delete", Some("delete")),
            ("cleanup.policy", "DELETE", None),
            ("cleanup.policy", "delete,", None),
            ("cleanup.policy", ",", None),
            ("compression.gzip.level", "-1", Some("-1")),
            ("compression.gzip.level", "0", None),
            ("compression.gzip.level", "10", None),
            ("compression.lz4.level", "17", Some("17")),
            ("compression.lz4.level", "18", None),
            ("compression.zstd.level", "-131072", Some("-131072")),
            ("compression.zstd.level", "23", None),
            ("remote.storage.enable", "False", Some("false")),
            ("remote.storage.enable", "true", None),
            ("remote.log.copy.disable", "true", Some("true")),
            ("local.retention.ms", "-2", Some("-2")),
            ("local.retention.ms", "5", Some("5")),
            ("local.retention.bytes", "-3", None),
            ("leader.replication.throttled.replicas", "", Some("")),
            ("leader.replication.throttled.replicas", " * ", Some("*")),
            ("leader.replication.throttled.replicas", "*,*", None),
            ("leader.replication.throttled.replicas", "*,1:2", None),
            ("leader.replication.throttled.replicas", "1:2, 3:4,", Some("1:2,3:4")),
            ("follower.replication.throttled.replicas", "1:2,1:2", Some("1:2,1:2")),
            ("follower.replication.throttled.replicas", "none", None),
            ("follower.replication.throttled.replicas", "1:-2", None),
        ] {
            let entry = find_topic(name).unwrap_or_else(|| panic!("no topic setting {name}"));
            assert_eq!(entry.read(value).ok().as_deref(), kept, "{name}={value:?}");
        }
    }
}
