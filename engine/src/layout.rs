//! What every file of ours begins with, and the sizes that all formats share.
//!
//! ```text
//! FileHeader, one block (4,096 bytes) at position 0 of every file
//! ┌────────┬────────┬──────────┬─────────┬──────────────┬────────┬───────┬──────────────┐
//! │ magic  │ version│ kind     │ incompat│ identity     │ number │ crc   │ reserved     │
//! │ 8 B    │ u16    │ u16      │ u32     │ 16 + 4 B     │ i64    │ u32   │ zeros …      │
//! └────────┴────────┴──────────┴─────────┴──────────────┴────────┴───────┴──────────────┘
//! ```
//! A reader refuses a magic, version or incompatible-feature bit it does not know, by name.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::error::StorageError;

/// Unit of every direct write: positions and lengths are multiples of it. 4,096 is the logical or physical
/// block of every device in use; writing whole ones means that no block with acknowledged bytes is rewritten.
pub const BLOCK: u64 = 4096;

/// First bytes of every file.
pub const MAGIC: [u8; 8] = *b"MILLRACE";

/// Folder of the journals in a data folder.
#[must_use]
pub fn journal_dir(data: &Path) -> PathBuf {
    data.join("journal")
}

/// Folder of the checkpoints.
#[must_use]
pub fn checkpoint_dir(data: &Path) -> PathBuf {
    data.join("checkpoint")
}

/// Folder of the notes of what replicas agreed on.
#[must_use]
pub fn agreed_dir(data: &Path) -> PathBuf {
    data.join("agreed")
}

/// Folder of the partitions.
#[must_use]
pub fn logs_dir(data: &Path) -> PathBuf {
    data.join("logs")
}

/// All of them.
#[must_use]
pub fn folders(data: &Path) -> [PathBuf; 5] {
    [journal_dir, checkpoint_dir, agreed_dir, logs_dir, removed_dir].map(|folder| folder(data))
}

/// Folder of what is needed no more and waits to be removed.
#[must_use]
pub fn removed_dir(data: &Path) -> PathBuf {
    data.join("removed")
}

/// Version of all formats together. Golden files in `tests/golden` hold one of each.
pub const FORMAT_VERSION: u16 = 1;

/// Incompatible features this build knows. None yet.
const KNOWN_FEATURES: u32 = 0;

/// What a file is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum FileKind {
    /// One slot of a shard's journal ring.
    Journal = 1,
    /// A piece of a partition's log.
    Segment = 2,
    /// Sparse index of a sealed segment.
    Index = 3,
    /// Where recovery starts.
    Checkpoint = 4,
    /// What the replicas of partitions had agreed on.
    Agreed = 5,
}

/// The block at position 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileHeader {
    /// What the file is.
    pub kind: FileKind,
    /// Topic id (segment, index) or nil.
    pub topic: Uuid,
    /// Partition (segment, index) or shard (journal, checkpoint, agreed).
    pub number: u32,
    /// Base offset (segment, index), ring slot (journal), incarnation (checkpoint).
    pub base: i64,
}

impl FileHeader {
    /// Length of the meaningful part; the rest of the block is zero.
    const LEN: usize = 48;

    /// Writes the whole block at the start of `out`, which is at least [`BLOCK`] long.
    pub fn encode(&self, out: &mut [u8]) {
        out[Self::LEN..BLOCK as usize].fill(0);
        out[0..8].copy_from_slice(&MAGIC);
        out[8..10].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        out[10..12].copy_from_slice(&(self.kind as u16).to_le_bytes());
        out[12..16].copy_from_slice(&KNOWN_FEATURES.to_le_bytes());
        out[16..32].copy_from_slice(self.topic.as_bytes());
        out[32..36].copy_from_slice(&self.number.to_le_bytes());
        out[36..44].copy_from_slice(&self.base.to_le_bytes());
        let crc = crc32c::crc32c(&out[0..44]);
        out[44..Self::LEN].copy_from_slice(&crc.to_le_bytes());
    }

    /// Reads and checks the block against what the file should be.
    ///
    /// # Errors
    /// [`StorageError::Incompatible`] names the magic, version, feature or kind that differs;
    /// [`StorageError::Corrupt`] if the checksum fails.
    pub fn decode(bytes: &[u8], kind: FileKind, path: &Path) -> Result<Self, StorageError> {
        let incompatible = |reason: String| StorageError::Incompatible {
            path: path.to_owned(),
            reason,
        };
        let head: &[u8; Self::LEN] = bytes
            .first_chunk()
            .ok_or_else(|| incompatible(format!("{} bytes are too few for a file header", bytes.len())))?;
        if head[0..8] != MAGIC {
            return Err(incompatible("not a Millrace file (magic differs)".into()));
        }
        let version = u16::from_le_bytes([head[8], head[9]]);
        if version != FORMAT_VERSION {
            return Err(incompatible(format!(
                "format version {version}, this build reads {FORMAT_VERSION}; use the release that wrote it"
            )));
        }
        let features = u32::from_le_bytes([head[12], head[13], head[14], head[15]]);
        if features & !KNOWN_FEATURES != 0 {
            return Err(incompatible(format!(
                "feature bits {:#x} are unknown to this build",
                features & !KNOWN_FEATURES
            )));
        }
        let crc = u32::from_le_bytes([head[44], head[45], head[46], head[47]]);
        if crc != crc32c::crc32c(&head[0..44]) {
            return Err(StorageError::Corrupt {
                path: path.to_owned(),
                position: 44,
                reason: "file header checksum".into(),
            });
        }
        if u16::from_le_bytes([head[10], head[11]]) != kind as u16 {
            return Err(incompatible(format!("not a {kind:?} file")));
        }
        let mut topic = [0; 16];
        topic.copy_from_slice(&head[16..32]);
        let mut base = [0; 8];
        base.copy_from_slice(&head[36..44]);
        Ok(Self {
            kind,
            topic: Uuid::from_bytes(topic),
            number: u32::from_le_bytes([head[32], head[33], head[34], head[35]]),
            base: i64::from_le_bytes(base),
        })
    }
}
