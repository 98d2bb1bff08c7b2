//! The metadata log's records.

// A length or count that is stored or sent must not wrap.
#![cfg_attr(not(test), warn(clippy::cast_possible_truncation))]

use rkyv::{
    Archive, Deserialize, Serialize,
    api::high::{HighDeserializer, HighSerializer, HighValidator},
    bytecheck::CheckBytes,
    rancor,
    ser::allocator::ArenaHandle,
    util::AlignedVec,
};
use thiserror::Error;

/// What a configuration entry belongs to.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum ConfigResource {
    /// A topic, by name.
    Topic(String),
    /// A broker, by node id; `None` is the default of all.
    Broker(Option<i32>),
}

/// How to reach one socket.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Address {
    /// Name or address.
    pub host: String,
    /// Port.
    pub port: u16,
}

/// A broker as it registers at every start.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Registration {
    /// Its id.
    pub node: i32,
    /// This start of it: drawn anew each time.
    pub incarnation: [u8; 16],
    /// Its data folder.
    pub directory: [u8; 16],
    /// Where clients connect: one address, or one for each core.
    pub clients: Vec<Address>,
    /// Where other nodes reach its shards, in order.
    pub peers: Vec<Address>,
    /// `broker.rack`.
    pub rack: Option<String>,
    /// Its `min.insync.replicas`, for topics that do not say. The controller must count as this broker does when it leads.
    pub min_insync: u32,
    /// Number of this start of its data folder. One that is lower than the cluster remembers belongs to an old copy.
    pub start: u64,
    /// Smallest and largest feature level that its build can act on.
    pub levels: (u16, u16),
}

/// A partition's placement and leadership.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug, Default)]
pub struct PartitionImage {
    /// Nodes that hold it, preferred leader first. While they are being exchanged, first those that it is to have.
    pub replicas: Vec<i32>,
    /// Those in sync.
    pub isr: Vec<i32>,
    /// Eligible leader replicas (KIP-966): not in sync any more, but since they were, the ISR has been too small for the high
    /// watermark to move. They hold everything that was acknowledged.
    pub elr: Vec<i32>,
    /// Replicas that are to be taken on (KIP-455).
    pub adding: Vec<i32>,
    /// Replicas that go once the others are in sync.
    pub removing: Vec<i32>,
    /// The leader, -1 for none.
    pub leader: i32,
    /// The leadership's number.
    pub leader_epoch: i32,
    /// Grows with every change.
    pub partition_epoch: i32,
}

impl PartitionImage {
    /// A new partition: all in sync, the first leads.
    #[must_use]
    pub fn new(replicas: Vec<i32>) -> Self {
        Self::new_among(replicas, |_| true)
    }

    /// A new partition: those in sync that take part, the first of them leads. The others join the ISR when they are back.
    #[must_use]
    pub fn new_among(replicas: Vec<i32>, is_active: impl Fn(i32) -> bool) -> Self {
        let isr: Vec<i32> = replicas.iter().copied().filter(|n| is_active(*n)).collect();
        Self {
            leader: isr.first().copied().unwrap_or(-1),
            isr,
            replicas,
            ..Self::default()
        }
    }
}

/// A node that takes part in the metadata quorum, as a voter or as one that only listens.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Member {
    /// Its id.
    pub node: i32,
    /// Its data folder. With another one it has forgotten how it voted, and is another member.
    pub directory: [u8; 16],
    /// How many folders the node had before this one.
    pub generation: u32,
    /// Where the others reach its first shard, `HOST:PORT`; empty for a node that is alone.
    pub address: String,
    /// Whether it is to vote. A new one does so once it has caught up.
    pub voter: bool,
}

/// One fact. Records of one change stand in one batch and are applied together.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub enum MetadataRecord {
    /// A topic exists.
    Topic {
        /// Its id.
        id: [u8; 16],
        /// Its name.
        name: String,
    },
    /// A partition exists, or its replicas or leader changed.
    Partition {
        /// Its topic.
        topic: [u8; 16],
        /// Its index.
        partition: u32,
        /// What is true of it now.
        state: PartitionImage,
    },
    /// A topic and all its partitions are gone.
    RemoveTopic {
        /// Its id.
        id: [u8; 16],
    },
    /// A configuration entry was set, or removed (`None`).
    Config {
        /// Of what.
        resource: ConfigResource,
        /// Kafka's name.
        name: String,
        /// Its value.
        value: Option<String>,
    },
    /// The cluster has a name.
    Cluster {
        /// Kafka's cluster id.
        id: String,
    },
    /// A broker was started and takes part (KIP-631). Whatever it still leads, it leads under a new epoch, because it may not
    /// remember what it appended under the old one.
    Broker(Registration),
    /// A broker is forgotten, with its configuration.
    RemoveBroker {
        /// Which.
        node: i32,
    },
    /// A node is a member of the metadata quorum, or is one under another folder or address.
    Member(Member),
    /// A node is no member any more.
    RemoveMember {
        /// Which.
        node: i32,
    },
    /// What all brokers may say and write from now on. Only grows.
    FeatureLevel {
        /// The level.
        level: u16,
    },
    /// A broker does not answer, or is stopping, and takes no part until it registers again.
    Fence {
        /// Which.
        node: i32,
    },
    /// Producer ids below `next` have been handed out.
    ProducerIds {
        /// First id that is free.
        next: i64,
    },
    /// Removes everything: what follows in the same batch is the whole image.
    Snapshot,
}

/// A change as it stands in the quorum's log: facts, and the version of the image that they were decided on. It counts only
/// if nothing has changed the image since.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Proposal {
    /// [`Image::version`](super::Image::version) that it was decided on.
    pub base: u64,
    /// The node that proposed it.
    pub by: i32,
    /// Drawn by the proposer, so that it knows its own.
    pub id: u64,
    /// What becomes true.
    pub records: Vec<MetadataRecord>,
}

/// A whole image as it is stored and sent.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Snapshot {
    /// [`Image::version`](super::Image::version).
    pub version: u64,
    /// Records that make it out of nothing.
    pub records: Vec<MetadataRecord>,
}

/// Bytes of the quorum's log or of a message between nodes that do not decode.
#[derive(Debug, Error)]
#[error("it does not decode: {reason}")]
pub struct DecodeError {
    reason: String,
}

impl DecodeError {
    /// With a reason of one's own.
    #[must_use]
    pub fn new(reason: &str) -> Self {
        Self { reason: reason.into() }
    }
}

/// Bytes of a value.
#[must_use]
pub fn encode<T>(value: &T) -> Vec<u8>
where
    T: for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, rancor::Error>>,
{
    rkyv::to_bytes::<rancor::Error>(value)
        .expect("serialising into memory does not fail")
        .to_vec()
}

/// Reads a value back.
///
/// # Errors
/// [`DecodeError`] for anything that is not its archive.
pub fn decode<T>(bytes: &[u8]) -> Result<T, DecodeError>
where
    T: Archive,
    T::Archived: for<'a> CheckBytes<HighValidator<'a, rancor::Error>> + Deserialize<T, HighDeserializer<rancor::Error>>,
{
    let mut aligned = AlignedVec::<16>::new();
    aligned.extend_from_slice(bytes);
    rkyv::from_bytes::<T, rancor::Error>(&aligned).map_err(|e| DecodeError { reason: e.to_string() })
}
