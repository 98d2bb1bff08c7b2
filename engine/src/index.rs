//! The sparse index of a segment: from offset or time to a place not far before it.

// A length or count that is stored or sent must not wrap.
#![cfg_attr(not(test), warn(clippy::cast_possible_truncation))]

use std::path::Path;

use rkyv::{Archive, Deserialize, Serialize, rancor};

use crate::{
    archive::{self, Packed},
    batch::BatchHeader,
    error::StorageError,
    host::Host,
    layout::{BLOCK, FileHeader, FileKind},
    types::{Offset, PartitionKey},
};

/// One entry for so many bytes of segment: a look-up reads at most that much in vain.
/// 128 KiB is a read of 0.1 ms here, and 8,192 entries (200 KiB) for a segment of 1 GiB.
pub const INTERVAL: u64 = 128 << 10;

/// A batch that the index knows.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub struct IndexEntry {
    /// Its first offset.
    pub offset: Offset,
    /// Where it stands.
    pub position: u64,
    /// Largest timestamp of all batches before it in the segment, ms.
    pub max_timestamp_before: i64,
}

/// Entries of one segment, in order.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct SegmentIndex {
    /// Batches before this position have no entries (the index was begun after a restart).
    pub complete_from: u64,
    entries: Vec<IndexEntry>,
    max_timestamp: i64,
}

impl SegmentIndex {
    /// An index of a segment's batches from `complete_from` on.
    #[must_use]
    pub fn new(complete_from: u64) -> Self {
        Self {
            complete_from,
            entries: Vec::new(),
            max_timestamp: i64::MIN,
        }
    }

    /// Notes the next batch.
    pub fn note(&mut self, header: &BatchHeader) {
        if self
            .entries
            .last()
            .is_none_or(|e| header.segment_position >= e.position + INTERVAL)
        {
            self.entries.push(IndexEntry {
                offset: header.base_offset,
                position: header.segment_position,
                max_timestamp_before: self.max_timestamp,
            });
        }
        self.max_timestamp = self.max_timestamp.max(header.max_timestamp);
    }

    /// Forgets the batches at or behind `position`. What the last entry stands for is to be noted again before what follows it.
    pub fn forget_from(&mut self, position: u64) {
        self.entries
            .truncate(self.entries.partition_point(|e| e.position < position));
        self.max_timestamp = self.entries.last().map_or(i64::MIN, |e| e.max_timestamp_before);
    }

    /// The last entry.
    #[must_use]
    pub fn last(&self) -> Option<&IndexEntry> {
        self.entries.last()
    }

    /// Puts the entries of the batches before [`complete_from`](Self::complete_from) in front.
    pub fn prepend(&mut self, before: Self) {
        let mut entries = before.entries;
        entries.extend(self.entries.iter().map(|e| IndexEntry {
            max_timestamp_before: e.max_timestamp_before.max(before.max_timestamp),
            ..*e
        }));
        self.entries = entries;
        self.complete_from = before.complete_from;
        self.max_timestamp = self.max_timestamp.max(before.max_timestamp);
    }

    /// The last entry that does not stand behind the batch that holds `offset`; `None` if it stands before all entries.
    #[must_use]
    pub fn entry_of(&self, offset: Offset) -> Option<&IndexEntry> {
        let i = self.entries.partition_point(|e| e.offset <= offset);
        i.checked_sub(1).map(|i| &self.entries[i])
    }

    /// A position at or before the batch that holds `offset`.
    #[must_use]
    pub fn position_of(&self, offset: Offset) -> u64 {
        self.entry_of(offset).map_or(BLOCK, |e| e.position)
    }

    /// An offset at or before the first batch with a timestamp of at least `timestamp`; `None` for the segment's first.
    #[must_use]
    pub fn offset_of_time(&self, timestamp: i64) -> Option<Offset> {
        let i = self.entries.partition_point(|e| e.max_timestamp_before < timestamp);
        i.checked_sub(1).map(|i| self.entries[i].offset)
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it has no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Writes a segment's index file: header block, then length, CRC and the rkyv archive. It is not flushed: one that a crash has left
    /// damaged does not check out, and nothing but a scan is lost.
    ///
    /// # Errors
    /// Any failure of the disk.
    pub async fn store<H: Host>(
        &self,
        host: &H,
        path: &Path,
        key: PartitionKey,
        base: Offset,
    ) -> Result<(), StorageError> {
        let header = FileHeader {
            kind: FileKind::Index,
            topic: key.topic,
            number: key.partition,
            base,
        };
        archive::write(host, path, header, &Packed::new(self)).await.map(drop)
    }

    /// Reads a stored index; `None` if there is none or it does not check out (it is then made anew).
    pub async fn load<H: Host>(host: &H, path: &Path) -> Option<Self> {
        let archive = archive::load(host, path, FileKind::Index).await.ok()??;
        rkyv::from_bytes::<Self, rancor::Error>(&archive).ok()
    }
}
