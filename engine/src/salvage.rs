//! Reading what can be read of a stopped broker's folder, damage or not, without changing anything.
//!
//! Nothing is believed but batches themselves: each names its partition, its offsets and its place, under a checksum. So
//! neither checkpoint nor index is needed, and behind damage the next batch is found again by looking for its header.
//! Segments give most; the journals of the latest incarnation fill in what was not in them yet.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use uuid::Uuid;

use crate::{
    batch::{self, BATCH_ALIGN, Batch, BatchHeader, HeaderError, RecordKind},
    checkpoint,
    error::StorageError,
    host::{Host, HostFile, OpenMode},
    journal::replay,
    layout::{self, BLOCK},
    segment::{partition_dir, segment_path},
    types::{LeaderEpoch, Offset, PartitionKey, align_up},
};

/// Bytes read at once.
const WINDOW: u64 = 1 << 20;

/// Something that could not be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Damage {
    /// Bytes of a file that are not what was written.
    Bytes {
        /// The file.
        path: PathBuf,
        /// First byte that fails.
        position: u64,
        /// What fails.
        reason: String,
    },
    /// Offsets that are in no file.
    Offsets {
        /// Of this partition.
        key: PartitionKey,
        /// First one missing.
        from: Offset,
        /// First one there again.
        until: Offset,
    },
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bytes { path, position, reason } => write!(f, "{} at byte {position}: {reason}", path.display()),
            Self::Offsets { key, from, until } => {
                write!(f, "partition {key}: offsets {from} to {} are lost", until - 1)
            }
        }
    }
}

/// A folder opened for reading.
pub struct Salvage<H: Host> {
    host: H,
    logs: PathBuf,
    /// Batches of the journals by partition and first offset.
    journal: BTreeMap<PartitionKey, BTreeMap<Offset, Batch>>,
    log_starts: BTreeMap<PartitionKey, Offset>,
    partitions: BTreeSet<PartitionKey>,
    damage: Vec<Damage>,
}

impl<H: Host> Salvage<H> {
    /// Opens a data folder that no broker runs on.
    ///
    /// # Errors
    /// The operating system's; damage is none.
    pub async fn open(host: H, data_dir: &Path) -> Result<Self, StorageError> {
        let mut salvage = Self {
            logs: layout::logs_dir(data_dir),
            journal: BTreeMap::new(),
            log_starts: BTreeMap::new(),
            partitions: BTreeSet::new(),
            damage: Vec::new(),
            host,
        };
        match checkpoint::load(&salvage.host, &layout::checkpoint_dir(data_dir)).await {
            Ok(found) => {
                let later = found.shards.into_iter().flat_map(|(_, c)| c.partitions);
                for partition in found.base.partitions.into_iter().chain(later) {
                    let log = partition.restore();
                    salvage.start_at(log.key, log.log_start());
                }
            }
            Err(error) => salvage.note(error)?,
        }
        let found = replay::salvage(&salvage.host, &layout::journal_dir(data_dir)).await?;
        salvage.damage.extend(found.damage);
        for record in found.records {
            let header = record.header;
            match header.kind {
                RecordKind::Batch => {
                    salvage.partitions.insert(header.key);
                    let batches = salvage.journal.entry(header.key).or_default();
                    if batches
                        .get(&header.base_offset)
                        .is_none_or(|known| known.header.leader_epoch <= header.leader_epoch)
                    {
                        batches.insert(header.base_offset, record);
                    }
                }
                RecordKind::LogStart => salvage.start_at(header.key, header.base_offset),
                RecordKind::Restart => salvage.start_at(header.key, header.base_offset),
                // Its payload is in the segment.
                RecordKind::Extent => {}
                // Where two batches claim an offset, the later leader epoch is believed.
                RecordKind::Truncate => {}
            }
        }
        salvage.list_folders()?;
        Ok(salvage)
    }

    fn start_at(&mut self, key: PartitionKey, offset: Offset) {
        let start = self.log_starts.entry(key).or_default();
        *start = offset.max(*start);
    }

    fn note(&mut self, error: StorageError) -> Result<(), StorageError> {
        match error {
            StorageError::Corrupt { path, position, reason } => {
                self.damage.push(Damage::Bytes { path, position, reason });
                Ok(())
            }
            other => Err(other),
        }
    }

    fn list_folders(&mut self) -> Result<(), StorageError> {
        let list = |path: &Path| self.host.list(path).map_err(StorageError::io("list", path));
        for topic in list(&self.logs)? {
            let Ok(id) = Uuid::parse_str(&topic) else { continue };
            for partition in list(&self.logs.join(&topic))? {
                if let Ok(partition) = partition.parse() {
                    self.partitions.insert(PartitionKey { topic: id, partition });
                }
            }
        }
        Ok(())
    }

    /// Damage of what is common to all partitions: checkpoints and journals.
    #[must_use]
    pub fn damage(&self) -> &[Damage] {
        &self.damage
    }

    /// Partitions of which anything was found.
    pub fn partitions(&self) -> impl Iterator<Item = PartitionKey> + '_ {
        self.partitions.iter().copied()
    }

    /// Shows a partition's sound batches in order of their offsets, and tells what could not be read.
    ///
    /// # Errors
    /// What `visit` says, or the operating system; damage is none.
    pub async fn visit<E: From<StorageError>>(
        &self,
        key: PartitionKey,
        mut visit: impl FnMut(&Batch) -> Result<(), E>,
    ) -> Result<Vec<Damage>, E> {
        let start = self.log_starts.get(&key).copied().unwrap_or(0);
        let mut order = Order {
            key,
            next: start,
            epoch: LeaderEpoch::MIN,
            damage: Vec::new(),
        };
        let none = BTreeMap::new();
        let mut journal = self.journal.get(&key).unwrap_or(&none).iter().peekable();
        let dir = partition_dir(&self.logs, &key);
        let names = self.host.list(&dir).map_err(StorageError::io("list", &dir))?;
        for base in names
            .iter()
            .filter_map(|n| n.strip_suffix(".segment")?.parse::<Offset>().ok())
        {
            let path = segment_path(&self.logs, &key, base);
            let file = self
                .host
                .open(&path, OpenMode::Existing)
                .await
                .map_err(StorageError::io("open", &path))?;
            let mut scan = Scan::<H> {
                size: file.size().await.map_err(StorageError::io("stat", &path))?,
                file,
                key,
                base,
                position: BLOCK,
                window: (0, Bytes::new()),
                path,
            };
            while let Some(batch) = scan.next(&mut order.damage).await? {
                while let Some((_, before)) = journal.next_if(|(at, _)| **at < batch.header.base_offset) {
                    order.take(before, &mut visit)?;
                }
                order.take(&batch, &mut visit)?;
            }
        }
        for (_, batch) in journal {
            order.take(batch, &mut visit)?;
        }
        Ok(order.damage)
    }
}

/// Lets batches pass in order of their offsets, each offset once.
struct Order {
    key: PartitionKey,
    next: Offset,
    epoch: LeaderEpoch,
    damage: Vec<Damage>,
}

impl Order {
    fn take<E>(&mut self, batch: &Batch, visit: &mut impl FnMut(&Batch) -> Result<(), E>) -> Result<(), E> {
        let header = &batch.header;
        // Behind the end of a log stand the leftovers of writes that were never acknowledged, of epochs gone by.
        if header.last_offset < self.next || header.leader_epoch < self.epoch {
            return Ok(());
        }
        if header.base_offset > self.next {
            self.damage.push(Damage::Offsets {
                key: self.key,
                from: self.next,
                until: header.base_offset,
            });
        }
        self.next = header.last_offset + 1;
        self.epoch = header.leader_epoch;
        visit(batch)
    }
}

/// A segment from front to back.
struct Scan<H: Host> {
    file: H::File,
    path: PathBuf,
    size: u64,
    key: PartitionKey,
    base: Offset,
    position: u64,
    window: (u64, Bytes),
}

impl<H: Host> Scan<H> {
    /// The next sound batch. A stretch of damage is noted once, where it begins.
    async fn next(&mut self, damage: &mut Vec<Damage>) -> Result<Option<Batch>, StorageError> {
        let mut in_damage = false;
        while self.position + batch::HEADER_LEN as u64 <= self.size {
            let at = self.position;
            let bytes = self.bytes(at, batch::HEADER_LEN as u64).await?;
            let Some(head) = bytes.first_chunk() else { break };
            let reason = match BatchHeader::decode(head) {
                Ok(header)
                    if header.key == self.key && header.segment_base == self.base && header.segment_position == at =>
                {
                    let payload = self
                        .bytes(at + batch::HEADER_LEN as u64, u64::from(header.payload_len))
                        .await?;
                    if payload.len() as u64 == u64::from(header.payload_len)
                        && crc32c::crc32c(&payload) == header.payload_crc
                    {
                        self.position = at + header.stored_len();
                        return Ok(Some(Batch { header, payload }));
                    }
                    "payload checksum differs"
                }
                // The rest of a block that was closed is all zeros.
                Err(HeaderError::Blank) => {
                    let block_end = align_up(at + 1, BLOCK);
                    if self.bytes(at, block_end - at).await?.iter().all(|b| *b == 0) {
                        self.position = block_end;
                        continue;
                    }
                    "zeros where a batch header should stand"
                }
                Ok(_) => "a batch of another place stands here",
                Err(HeaderError::Damaged) => "batch header checksum differs",
            };
            if !in_damage {
                in_damage = true;
                damage.push(Damage::Bytes {
                    path: self.path.clone(),
                    position: at,
                    reason: reason.into(),
                });
            }
            self.position = at + BATCH_ALIGN;
        }
        Ok(None)
    }

    /// Bytes of the file; fewer at its end.
    async fn bytes(&mut self, at: u64, len: u64) -> Result<Bytes, StorageError> {
        let end = (at + len).min(self.size);
        let (start, window) = &self.window;
        if at < *start || end > start + window.len() as u64 {
            let start = at / BLOCK * BLOCK;
            let read = align_up(end - start, BLOCK).max(WINDOW) as usize;
            let bytes = self
                .file
                .read_at(start, read)
                .await
                .map_err(StorageError::io("read", &self.path))?;
            self.window = (start, bytes.into());
        }
        let (start, window) = &self.window;
        let from = ((at - start) as usize).min(window.len());
        let to = (end.saturating_sub(*start) as usize).clamp(from, window.len());
        Ok(window.slice(from..to))
    }
}
