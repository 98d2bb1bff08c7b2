//! Where recovery starts: every partition's state up to what its segments hold, and the journal position
//! from which to replay.
//!
//! A broker's start (its *incarnation*) begins with a base checkpoint of all partitions, written when the journals
//! of the one before have been replayed. Each shard then writes checkpoints of its own partitions as its journal moves on;
//! the latest of each shard counts. Files are written beside, flushed, and renamed into place.

use std::{collections::HashMap, path::Path, sync::Arc};

use rkyv::{Archive, Deserialize, Serialize, rancor};
use uuid::Uuid;

use crate::{
    archive::{self, Packed},
    error::StorageError,
    host::Host,
    journal::Position,
    layout::{BLOCK, FileHeader, FileKind},
    log::{EpochCache, LogState, ProducerEntry, SegmentMeta},
    slab::Snapshot,
    types::{Offset, PartitionKey, ProducerId},
};

/// Offsets and lengths beyond these are damage: additions to them must not overflow.
const OFFSET_MAX: Offset = Offset::MAX / 2;
const SEGMENT_END_MAX: u64 = 1 << 48;
/// Partitions, producers and segments that are packed at once: some hundred microseconds. Another thread may have to wait for a core for longer.
const PARTS_HERE: usize = 1_000;
/// More cores than any host has.
const SHARDS_MAX: u32 = 1 << 16;

/// A log's state as of some time. To take it costs little, however many producers there are.
#[derive(Debug)]
pub struct Captured {
    key: PartitionKey,
    log_start: Offset,
    log_end: Offset,
    epochs: EpochCache,
    producers: Snapshot<(ProducerId, ProducerEntry)>,
    segments: Vec<SegmentMeta>,
}

impl Captured {
    /// A log's state, all of whose batches are in segments or about to be before this is stored.
    #[must_use]
    pub fn of(state: &LogState) -> Self {
        Self {
            key: state.key,
            log_start: state.log_start(),
            log_end: state.log_end(),
            epochs: state.epochs.clone(),
            producers: state.producers.snapshot(),
            segments: state.segments().to_vec(),
        }
    }

    /// The segment that takes appends: its first offset, and where what is captured of it ends.
    #[must_use]
    pub fn active_end(&self) -> Option<(Offset, u64)> {
        self.segments.last().map(|s| (s.base, s.end))
    }

    /// How much there is to pack, about.
    fn parts(&self) -> usize {
        1 + self.producers.places() + self.segments.len()
    }
}

/// A partition whose offsets below `log_end` are all in its segments.
#[derive(Archive, Serialize, Deserialize, Clone, Debug)]
pub struct PartitionCheckpoint {
    topic: [u8; 16],
    partition: u32,
    log_start: Offset,
    log_end: Offset,
    epochs: EpochCache,
    producers: HashMap<ProducerId, ProducerEntry>,
    segments: Vec<SegmentMeta>,
}

impl From<&Captured> for PartitionCheckpoint {
    fn from(captured: &Captured) -> Self {
        Self {
            topic: *captured.key.topic.as_bytes(),
            partition: captured.key.partition,
            log_start: captured.log_start,
            log_end: captured.log_end,
            epochs: captured.epochs.clone(),
            producers: captured.producers.iter().cloned().collect(),
            segments: captured.segments.clone(),
        }
    }
}

impl PartitionCheckpoint {
    /// Whose state it is.
    #[must_use]
    pub fn key(&self) -> PartitionKey {
        PartitionKey {
            topic: Uuid::from_bytes(self.topic),
            partition: self.partition,
        }
    }

    /// What cannot be so, if anything: a checksum says only that the bytes are those that were written.
    fn fault(&self) -> Option<&'static str> {
        if !(0 <= self.log_start && self.log_start <= self.log_end && self.log_end <= OFFSET_MAX) {
            return Some("offsets are out of order");
        }
        let rising = self.segments.windows(2).all(|w| w[0].base < w[1].base);
        let within =
            |s: &SegmentMeta| 0 <= s.base && s.base <= self.log_end && (BLOCK..=SEGMENT_END_MAX).contains(&s.end);
        if !rising || !self.segments.iter().all(within) {
            return Some("segments are out of order");
        }
        None
    }

    /// The log as replay takes it up.
    #[must_use]
    pub fn restore(self) -> LogState {
        LogState::restore(
            self.key(),
            self.log_start,
            self.log_end,
            self.epochs,
            self.producers.into_iter().collect(),
            self.segments,
        )
    }
}

/// The content of a checkpoint file.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, Default)]
pub struct Checkpoint {
    replay_seq: u64,
    replay_offset: u64,
    /// Shards of the incarnation (in its base checkpoint).
    pub shards: u32,
    /// Partitions, of all shards (base) or of one.
    pub partitions: Vec<PartitionCheckpoint>,
}

impl Checkpoint {
    /// Where replay begins.
    #[must_use]
    pub fn replay_from(&self) -> Position {
        Position {
            seq: self.replay_seq,
            offset: self.replay_offset,
        }
    }
}

/// Which checkpoint a file is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Name {
    /// All partitions, at the start of an incarnation.
    Base {
        /// The incarnation.
        incarnation: u64,
    },
    /// One shard's, later.
    Shard {
        /// The incarnation.
        incarnation: u64,
        /// The shard.
        shard: u32,
    },
}

impl Name {
    fn file(self) -> String {
        match self {
            Self::Base { incarnation } => format!("{incarnation:010}-base.checkpoint"),
            Self::Shard { incarnation, shard } => format!("{incarnation:010}-{shard:04}.checkpoint"),
        }
    }

    fn parse(name: &str) -> Option<Self> {
        let (incarnation, rest) = name.strip_suffix(".checkpoint")?.split_once('-')?;
        let incarnation = incarnation.parse().ok()?;
        Some(match rest {
            "base" => Self::Base { incarnation },
            shard => Self::Shard {
                incarnation,
                shard: shard.parse().ok()?,
            },
        })
    }

    fn incarnation(self) -> u64 {
        match self {
            Self::Base { incarnation } | Self::Shard { incarnation, .. } => incarnation,
        }
    }
}

/// Writes a checkpoint and puts it in place of the one of the same name: of these partitions, of a shard whose journal matters from
/// `replay_from` on, or of an incarnation with so many `shards`.
///
/// # Errors
/// Any failure of the disk; the one before is then still in place.
pub async fn store<H: Host>(
    host: &H,
    dir: &Path,
    name: Name,
    replay_from: Position,
    shards: u32,
    partitions: Vec<Arc<Captured>>,
) -> Result<(), StorageError> {
    host.create_dir(dir).await.map_err(StorageError::io("create", dir))?;
    let path = dir.join(name.file());
    let temporary = dir.join(format!("{}.new", name.file()));
    let header = FileHeader {
        kind: FileKind::Checkpoint,
        topic: Uuid::nil(),
        number: match name {
            Name::Base { .. } => u32::MAX,
            Name::Shard { shard, .. } => shard,
        },
        base: name.incarnation() as i64,
    };
    let parts: usize = partitions.iter().map(|p| p.parts()).sum();
    let pack = move || {
        Packed::new(&Checkpoint {
            replay_seq: replay_from.seq,
            replay_offset: replay_from.offset,
            shards,
            partitions: partitions.iter().map(|p| PartitionCheckpoint::from(&**p)).collect(),
        })
    };
    let packed = if parts > PARTS_HERE {
        host.aside(pack).await
    } else {
        pack()
    };
    archive::store(host, &temporary, header, &packed).await?;
    host.rename(&temporary, &path)
        .map_err(StorageError::io("rename", &temporary))?;
    host.sync_dir(dir).await.map_err(StorageError::io("sync", dir))
}

/// The latest incarnation's checkpoints: its base and what its shards wrote since.
#[derive(Default, Debug)]
pub struct Found {
    /// 0 if the folder is new.
    pub incarnation: u64,
    /// Base first, then shards in order.
    pub base: Checkpoint,
    /// Later checkpoints by shard.
    pub shards: Vec<(u32, Checkpoint)>,
}

/// Whether a folder has a base checkpoint.
///
/// # Errors
/// Any failure of the disk.
pub fn is_there<H: Host>(host: &H, dir: &Path) -> Result<bool, StorageError> {
    let names = host.list(dir).map_err(StorageError::io("list", dir))?;
    Ok(names.iter().any(|n| matches!(Name::parse(n), Some(Name::Base { .. }))))
}

/// Reads the checkpoints of a folder.
///
/// # Errors
/// [`StorageError::Corrupt`] or [`StorageError::Incompatible`] for a file that fails its checks.
pub async fn load<H: Host>(host: &H, dir: &Path) -> Result<Found, StorageError> {
    let names: Vec<Name> = host
        .list(dir)
        .map_err(StorageError::io("list", dir))?
        .iter()
        .filter_map(|n| Name::parse(n))
        .collect();
    let Some(incarnation) = names
        .iter()
        .filter(|n| matches!(n, Name::Base { .. }))
        .map(|n| n.incarnation())
        .max()
    else {
        return Ok(Found::default());
    };
    let mut found = Found {
        incarnation,
        base: read(host, &dir.join(Name::Base { incarnation }.file())).await?,
        shards: Vec::new(),
    };
    for name in names {
        if let Name::Shard { incarnation: i, shard } = name
            && i == incarnation
        {
            found.shards.push((shard, read(host, &dir.join(name.file())).await?));
        }
    }
    Ok(found)
}

async fn read<H: Host>(host: &H, path: &Path) -> Result<Checkpoint, StorageError> {
    let corrupt = |reason: String| StorageError::Corrupt {
        path: path.to_owned(),
        position: 0,
        reason,
    };
    let archive = archive::load(host, path, FileKind::Checkpoint)
        .await?
        .ok_or_else(|| corrupt("listed but not there".into()))?;
    let checkpoint = rkyv::from_bytes::<Checkpoint, rancor::Error>(&archive).map_err(|e| corrupt(e.to_string()))?;
    if checkpoint.shards > SHARDS_MAX {
        return Err(corrupt(format!("{} shards", checkpoint.shards)));
    }
    for partition in &checkpoint.partitions {
        if let Some(fault) = partition.fault() {
            return Err(corrupt(format!("partition {}: {fault}", partition.key())));
        }
    }
    Ok(checkpoint)
}

/// Removes checkpoints of other incarnations than `keep`, and files left half-written.
///
/// # Errors
/// Any failure of the disk.
pub async fn remove_others<H: Host>(host: &H, dir: &Path, keep: u64) -> Result<(), StorageError> {
    for name in host.list(dir).map_err(StorageError::io("list", dir))? {
        if Name::parse(&name).is_none_or(|n| n.incarnation() != keep) {
            let path = dir.join(name);
            host.remove_file(&path)
                .await
                .map_err(StorageError::io("remove", &path))?;
        }
    }
    host.sync_dir(dir).await.map_err(StorageError::io("sync", dir))
}
