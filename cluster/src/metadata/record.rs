//! The metadata log's records.

use rkyv::{Archive, Deserialize, Serialize, rancor};
use thiserror::Error;

/// What a configuration entry belongs to.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum ConfigResource {
    /// A topic, by name.
    Topic(String),
    /// A broker, by node id; `None` is the default of all.
    Broker(Option<i32>),
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
    /// A node was started: whatever it led, it leads under a new epoch, because it may not remember what it
    /// appended under the old one.
    BrokerStarted {
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

/// A metadata batch that does not decode.
#[derive(Debug, Error)]
#[error("a metadata record does not decode: {reason}")]
pub struct DecodeError {
    reason: String,
}

/// The payload of one batch of the metadata log.
#[must_use]
pub fn encode(records: &Vec<MetadataRecord>) -> Vec<u8> {
    rkyv::to_bytes::<rancor::Error>(records)
        .expect("serialising into memory does not fail")
        .to_vec()
}

/// Reads a payload back.
///
/// # Errors
/// [`DecodeError`] for anything that is not an archive of records.
pub fn decode(payload: &[u8]) -> Result<Vec<MetadataRecord>, DecodeError> {
    let mut aligned = rkyv::util::AlignedVec::<16>::new();
    aligned.extend_from_slice(payload);
    rkyv::from_bytes::<Vec<MetadataRecord>, rancor::Error>(&aligned).map_err(|e| DecodeError { reason: e.to_string() })
}
