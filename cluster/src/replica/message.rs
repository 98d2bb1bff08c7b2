//! What nodes say to each other. Every value is an rkyv archive, checked when it comes in.
//!
//! ```text
//! frame of a replica stream: ┌─────────────┬─────────────────┬──────────────────────────────────────────┐
//!                            │ length, 4 B │ Request archive │ batches: header of 128 B, payload, …      │
//!                            └─────────────┴─────────────────┴──────────────────────────────────────────┘
//! ```

// A length or count that is stored or sent must not wrap.
#![cfg_attr(not(test), warn(clippy::cast_possible_truncation))]

use bytes::Bytes;
use millrace_engine::{
    LeaderEpoch, Offset, PartitionKey,
    batch::{Batch, BatchHeader, HEADER_LEN},
};
use rkyv::{Archive, Deserialize, Serialize};
use uuid::Uuid;

use crate::metadata::record::{self, DecodeError};

/// A partition on the wire.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub struct Key {
    topic: [u8; 16],
    partition: u32,
}

impl From<PartitionKey> for Key {
    fn from(key: PartitionKey) -> Self {
        Self {
            topic: key.topic.into_bytes(),
            partition: key.partition,
        }
    }
}

impl From<Key> for PartitionKey {
    fn from(key: Key) -> Self {
        Self {
            topic: Uuid::from_bytes(key.topic),
            partition: key.partition,
        }
    }
}

/// A leader to a follower.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Request {
    /// Which partition.
    pub key: Key,
    /// The leadership it speaks for.
    pub epoch: LeaderEpoch,
    /// Number of the probe that this follows; answers repeat it, so that old ones are known.
    pub round: u32,
    /// What the replicas in sync agree on.
    pub high_watermark: Offset,
    /// First offset of the leader's log.
    pub log_start: Offset,
    /// What to do.
    pub order: Order,
}

/// What a follower is to do.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// Say where the log stands.
    Probe,
    /// Cut what was not written under `epoch` or an older one, and what stands at or behind `end`; say where the log stands.
    Truncate {
        /// The largest epoch that both may have.
        epoch: LeaderEpoch,
        /// Where it ends with the leader.
        end: Offset,
    },
    /// Empty the log and go on at `at`; say where the log stands.
    Restart {
        /// The leader's first offset.
        at: Offset,
    },
    /// Append the batches behind the archive; say when they are durable.
    Append,
    /// Only take note of high watermark and log start.
    Note,
}

/// Where a follower's log stands.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub struct Standing {
    /// Its end.
    pub log_end: Offset,
    /// What of it is durable.
    pub durable_end: Offset,
    /// Epoch of its last batch, -1 if it has none.
    pub last_epoch: LeaderEpoch,
}

/// A follower to a leader.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// Which partition.
    pub key: Key,
    /// The leadership spoken to.
    pub epoch: LeaderEpoch,
    /// The request's.
    pub round: u32,
    /// What it says.
    pub says: Says,
}

/// What a follower answers.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Says {
    /// The log stands so: to a probe or a cut, or to an append that does not go on where the log ends.
    Stands(Standing),
    /// So much is durable.
    Durable(Offset),
    /// It knows nothing of this leadership yet; ask again soon.
    NotYet,
    /// It knows of a later leadership.
    Stale,
    /// The partition is on another of its shards.
    Elsewhere {
        /// Which.
        shard: u32,
    },
    /// Its log has failed, or has no room; ask again later.
    Failed,
    /// The log starts there, durably: to a note of the leader's log start, from version
    /// [`LOG_START_VERSION`](crate::peer::LOG_START_VERSION) on.
    LogStart(Offset),
}

/// A request's frame, in parts.
#[must_use]
pub fn encode_request(request: &Request, batches: &[Batch]) -> Vec<Bytes> {
    let head = record::encode(request);
    let mut parts = Vec::with_capacity(1 + 2 * batches.len());
    let mut first = Vec::with_capacity(4 + head.len() + HEADER_LEN);
    let head_len = u32::try_from(head.len()).expect("a request names at most as many partitions as there are");
    first.extend_from_slice(&head_len.to_le_bytes());
    first.extend_from_slice(&head);
    for batch in batches {
        let mut header = [0; HEADER_LEN];
        batch.header.encode(&mut header);
        first.extend_from_slice(&header);
        parts.push(Bytes::from(std::mem::take(&mut first)));
        parts.push(batch.payload.clone());
    }
    if batches.is_empty() {
        parts.push(first.into());
    }
    parts
}

/// A request's frame, read back.
///
/// # Errors
/// [`DecodeError`] for anything that is not one.
pub fn decode_request(frame: &Bytes) -> Result<(Request, Vec<Batch>), DecodeError> {
    let short = || DecodeError::new("a request that ends too early");
    let len = u32::from_le_bytes(*frame.first_chunk::<4>().ok_or_else(short)?) as usize;
    let head = frame.get(4..4 + len).ok_or_else(short)?;
    let request: Request = record::decode(head)?;
    let mut batches = Vec::new();
    let mut at = 4 + len;
    while at < frame.len() {
        let header = frame[at..].first_chunk::<HEADER_LEN>().ok_or_else(short)?;
        let header = BatchHeader::decode(header).map_err(|_| DecodeError::new("a batch header that is none"))?;
        at += HEADER_LEN;
        let end = at + header.payload_len as usize;
        if end > frame.len() {
            return Err(short());
        }
        batches.push(Batch {
            header,
            payload: frame.slice(at..end),
        });
        at = end;
    }
    Ok((request, batches))
}
