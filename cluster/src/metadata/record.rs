//! The metadata log's records.

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
        /// Nodes that hold it, preferred leader first.
        replicas: Vec<i32>,
        /// Those in sync.
        isr: Vec<i32>,
        /// The leader, -1 for none.
        leader: i32,
        /// Its leadership's number.
        leader_epoch: i32,
        /// Grows with every change.
        partition_epoch: i32,
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
