//! The crate's errors. Callers match on variants; nothing matches on text.

use std::{
    io,
    path::{Path, PathBuf},
};

use thiserror::Error;

use crate::types::{Offset, PartitionKey, ProducerEpoch, ProducerId};

/// The disk failed, or what it holds cannot be trusted.
#[derive(Debug, Error)]
pub enum StorageError {
    /// The operating system refused an operation.
    #[error("{operation} {path}: {source}", path = path.display())]
    Io {
        /// What was tried, as a verb.
        operation: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Bytes that were known to be durable no longer check out.
    #[error("{path} is corrupt at byte {position}: {reason}", path = path.display())]
    Corrupt {
        /// The damaged file.
        path: PathBuf,
        /// First byte that fails.
        position: u64,
        /// Which check failed.
        reason: String,
    },
    /// Something is gone that every folder of its kind has.
    #[error("{path} is missing or not complete: {reason}", path = path.display())]
    Missing {
        /// The file or folder.
        path: PathBuf,
        /// What was in it, and what to do.
        reason: String,
    },
    /// A file of a format that this build cannot read.
    #[error("{path}: {reason}", path = path.display())]
    Incompatible {
        /// The refused file.
        path: PathBuf,
        /// Magic, version or feature bits that differ, by name.
        reason: String,
    },
    /// The partition is on its way to another shard, or what was here of an earlier copy is not gone yet; that passes.
    #[error("the partition is being moved to another core, or is not ready yet")]
    Moving,
    /// The partition was deleted, or has left this shard.
    #[error("the partition is here no more")]
    Left,
    /// An earlier write or flush failed; the log takes no more appends until the process is restarted.
    #[error("the log was taken offline by an earlier failure: {stage}")]
    Poisoned {
        /// The write or flush that failed, with its error.
        stage: String,
    },
}

impl StorageError {
    /// For `map_err`: what was tried, and on which file or folder.
    pub(crate) fn io<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self::Io {
            operation,
            path: path.to_owned(),
            source,
        }
    }

    /// Whether the cause is a lack of memory or descriptors, or nothing at all: the file may well be sound.
    #[must_use]
    pub(crate) fn is_shortage(&self) -> bool {
        // ENFILE and EMFILE on Linux, for which there is no kind.
        const TOO_MANY_FILES: [i32; 2] = [23, 24];
        use io::ErrorKind::{Interrupted, OutOfMemory, WouldBlock};
        match self {
            Self::Io { source, .. } => {
                matches!(source.kind(), Interrupted | OutOfMemory | WouldBlock)
                    || source.raw_os_error().is_some_and(|e| TOO_MANY_FILES.contains(&e))
            }
            _ => false,
        }
    }

    /// Whether nothing was begun for lack of descriptors or memory to open a file: that passes, too.
    #[must_use]
    pub(crate) fn is_not_opened(&self) -> bool {
        matches!(
            self,
            Self::Io {
                operation: "open" | "create",
                ..
            }
        ) && self.is_shortage()
    }

    /// Whether the cause is a lack of room, which passes when room returns.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        match self {
            Self::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            Self::Corrupt { .. }
            | Self::Missing { .. }
            | Self::Incompatible { .. }
            | Self::Moving
            | Self::Left
            | Self::Poisoned { .. } => false,
        }
    }
}

/// A record batch that came from outside is not what it says.
#[derive(Debug, Error, PartialEq, Eq, Clone)]
pub enum BatchError {
    /// Shorter than a batch header, or than the length it states.
    #[error("record batch truncated: {have} bytes of {need}")]
    Truncated {
        /// Bytes present.
        have: usize,
        /// Bytes that the header asks for.
        need: usize,
    },
    /// Message formats v0 and v1, which Kafka 4 no longer accepts either.
    #[error("record batch has magic {magic}, only 2 is supported")]
    UnsupportedMagic {
        /// The magic byte.
        magic: i8,
    },
    /// CRC-32C over the batch differs.
    #[error("record batch CRC is {stated:#010x}, its bytes give {actual:#010x}")]
    Crc {
        /// In the header.
        stated: u32,
        /// Over the bytes.
        actual: u32,
    },
    /// Counts, deltas or attributes contradict each other.
    #[error("invalid record batch: {reason}")]
    Invalid {
        /// Which rule is broken.
        reason: &'static str,
    },
    /// A compressed payload that does not unpack, or unpacks to more than the bound.
    #[error("records do not decompress: {reason}")]
    Decompress {
        /// The codec's words.
        reason: String,
    },
}

/// Why a batch was not appended.
#[derive(Debug, Error)]
pub enum AppendError {
    /// The shard does not hold this partition.
    #[error("partition {0} is not here")]
    UnknownPartition(PartitionKey),
    /// The log cannot take it.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// No room on the disk for the next segment; passes when room returns.
    #[error("the disk is full: {reason}")]
    DiskFull {
        /// What could not be reserved.
        reason: String,
    },
    /// The batch itself is wrong.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// A sequence number leaves a gap (KIP-98).
    #[error("producer {producer_id} sent sequence {got} where {expected} was due")]
    OutOfOrderSequence {
        /// Which producer.
        producer_id: ProducerId,
        /// Next sequence the log would take.
        expected: i32,
        /// First sequence of the batch.
        got: i32,
    },
    /// A newer incarnation of the producer has written already.
    #[error("producer {producer_id} epoch {got} is fenced by {current}")]
    ProducerFenced {
        /// Which producer.
        producer_id: ProducerId,
        /// Latest epoch seen.
        current: ProducerEpoch,
        /// Epoch of the batch.
        got: ProducerEpoch,
    },
}

/// Why records could not be read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The shard does not hold this partition.
    #[error("partition {0} is not here")]
    UnknownPartition(PartitionKey),
    /// Below the log start offset or above the log end offset.
    #[error("offset {offset} is outside [{log_start}, {log_end}]")]
    OffsetOutOfRange {
        /// What was asked for.
        offset: Offset,
        /// First offset held.
        log_start: Offset,
        /// Next offset to be written.
        log_end: Offset,
    },
    /// The disk failed or holds damage there.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Stored records that do not decode (only where a look-up has to open them).
    #[error(transparent)]
    Batch(#[from] BatchError),
}
