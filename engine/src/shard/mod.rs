//! One shard: its partitions, its journal, its caches, and the tasks that keep them going.
//!
//! Write path: [`Shard::admit`] (room in the queue) → [`Shard::append`] (offsets and places, at once) → the journal's
//! next group, or straight to the segment for large batches while the journal is short of room (`append`) → `commit`
//! (flushed: high watermark moves, waiters wake) → `writeback` (from memory to segments in large pieces; the journal's
//! tail moves).
//! A follower's appends, and the cuts that make its log its leader's, are in `replica`. How a partition goes to another shard
//! is in `moves`, how it leaves the node in `leaving`.
//! Read path: the tail in memory, else `read` through the read cache; where to begin, `indexes` knows.
//!
//! Runs on one thread; every borrow of a cell ends before the next await.

mod append;
mod commit;
mod indexes;
mod leaving;
mod maintain;
mod moves;
mod newest;
mod partition;
mod read;
mod removal;
mod replica;
mod writeback;

use std::{
    cell::{Cell, RefCell},
    collections::{VecDeque, hash_map::Entry},
    path::PathBuf,
    rc::Rc,
    time::Duration,
};

pub use append::Appended;
pub use partition::{Partition, PartitionStatus};
pub use read::{FoundTime, RecordTimes, Records};
use rustc_hash::FxHashSet;

use crate::{
    arena::{self, Arena},
    cache::ReadCache,
    error::StorageError,
    host::Host,
    index_cache::IndexCache,
    journal::{Grown, Journal, JournalConfig, Position},
    layout,
    log::{LogConfig, LogState},
    paged::PagedDeque,
    segment::{FileCache, Pace},
    shard::removal::Removal,
    sync::{Budget, Permit, WaitList},
    types::{Offset, PartitionKey, PartitionMap},
};

/// Pause before room for the rest of the journal is asked for again.
const GROW_RETRY: Duration = Duration::from_secs(1);
/// How long work in the background that waits for nothing leaves the thread to others, now and then.
const BREATH: Duration = Duration::from_millis(1);
/// One part in so many of the read cache's bytes is for indexes.
const INDEX_SHARE: usize = 8;

/// The broker's own logs leave so small a part of the space that is kept free to metadata, which goes on as long as there is any.
const INTERNAL_SHARE: u64 = 4;

/// Sizes of a shard. All are limits: what happens at each is said here.
#[derive(Clone, Debug)]
pub struct ShardConfig {
    /// Data folder.
    pub dir: PathBuf,
    /// Number of this shard.
    pub shard: u32,
    /// This start of the broker; greater than any before.
    pub incarnation: u64,
    /// Bytes of one journal file.
    pub journal_slot_bytes: u64,
    /// Journal files; when all are in use appends wait for write-back.
    pub journal_slots: u32,
    /// Batches at least this long are written straight to their segment while the journal has not plenty of room.
    pub direct_bytes_min: usize,
    /// Segments at least this long have room made for what comes next; shorter ones are lengthened by each write.
    pub room_ahead_min: u64,
    /// Bytes of appends that wait for the disk; above it [`Shard::admit`] waits.
    pub queue_bytes: u64,
    /// Bytes of recent batches kept in memory; above it the oldest that are in segments go.
    pub tail_bytes: usize,
    /// Bytes of pieces read from segments, and of indexes.
    pub read_cache_bytes: usize,
    /// Open segment files; the one used longest ago is closed for the next.
    pub open_files: usize,
    /// Partitions written at once from which on they are made durable together ([`Host::sync_all`]) instead of file by file.
    pub sync_all_min: usize,
    /// Free bytes on the disk below which appends are refused; those to the broker's own logs below an [`INTERNAL_SHARE`]th of that.
    pub free_bytes_min: u64,
    /// Pause between two looks for what retention deletes; in whole seconds, rounded up.
    pub retention_check: Duration,
    /// A producer that has not written for so long is forgotten.
    pub producer_expiration_ms: i64,
    /// Producers remembered, of all partitions together; above it a partition that remembers another one forgets one that has been idle for
    /// long, if it has several.
    pub producers_max: usize,
}

impl ShardConfig {
    /// Free bytes on the disk below which appends to such a log are refused.
    fn kept_free_of(&self, log: &LogConfig) -> u64 {
        match log.is_internal {
            true => self.free_bytes_min / INTERNAL_SHARE,
            false => self.free_bytes_min,
        }
    }

    /// Folder of the journals.
    #[must_use]
    pub fn journal_dir(&self) -> PathBuf {
        layout::journal_dir(&self.dir)
    }

    /// Folder of the checkpoints.
    #[must_use]
    pub fn checkpoint_dir(&self) -> PathBuf {
        layout::checkpoint_dir(&self.dir)
    }

    /// Folder of the partitions.
    #[must_use]
    pub fn logs_dir(&self) -> PathBuf {
        layout::logs_dir(&self.dir)
    }
}

/// Counters of a shard since it was opened.
#[derive(Default, Debug)]
pub struct Counters {
    /// Groups written to the journal.
    pub groups: Cell<u64>,
    /// Batches in them.
    pub batches: Cell<u64>,
    /// Bytes of payload appended.
    pub bytes_in: Cell<u64>,
    /// Batches that went straight to segments.
    pub direct_batches: Cell<u64>,
    /// Passes of write-back.
    pub writebacks: Cell<u64>,
    /// Reads that found their records in memory.
    pub tail_reads: Cell<u64>,
    /// Reads that went to segments.
    pub segment_reads: Cell<u64>,
}

pub(crate) struct Inner<H: Host> {
    pub(crate) host: H,
    pub(crate) config: ShardConfig,
    pub(crate) partitions: RefCell<PartitionMap<Rc<Partition>>>,
    pub(crate) journal: Journal<H, commit::Completion>,
    pub(crate) files: FileCache<H>,
    pub(crate) removal: Removal<H>,
    /// Partitions of deleted topics whose folders are still where they were.
    pub(crate) leaving: RefCell<VecDeque<PartitionKey>>,
    /// Partitions that are being cleared, the first of them now.
    pub(crate) clearing: RefCell<VecDeque<PartitionKey>>,
    pub(crate) clearing_changed: WaitList,
    /// Partitions that were cleared since the start.
    pub(crate) cleared: RefCell<FxHashSet<PartitionKey>>,
    pub(crate) read_cache: ReadCache,
    pub(crate) index_cache: IndexCache,
    /// The front of some segment's index is being looked up.
    pub(crate) completing_index: Cell<bool>,
    pub(crate) queue: Rc<Budget>,
    /// Of what is written to segments in the background.
    pub(crate) pace: Pace,
    /// Reads in flight while the journal is in use.
    pub(crate) reading: Rc<Budget>,
    pub(crate) arena: Arena,
    /// Batches in memory, oldest first: the order of eviction.
    pub(crate) tail_order: RefCell<PagedDeque<(Rc<Partition>, Offset)>>,
    pub(crate) tail_bytes: Cell<usize>,
    /// Producers remembered, as of each partition's last append.
    pub(crate) producers: Cell<usize>,
    pub(crate) dirty: RefCell<Vec<Rc<Partition>>>,
    pub(crate) writeback_wanted: Cell<bool>,
    pub(crate) writeback_signal: WaitList,
    pub(crate) writeback_done: WaitList,
    pub(crate) writeback_running: Cell<bool>,
    /// The last pass carried batches of failed partitions forward.
    pub(crate) carries: Cell<bool>,
    /// Where replay would begin.
    pub(crate) checkpointed: Cell<Position>,
    pub(crate) poisoned: RefCell<Option<String>>,
    /// Free on the disk when it was asked last, less what has been appended since.
    pub(crate) disk_free: Cell<u64>,
    /// It had no room for clients' appends then.
    pub(crate) disk_full: Cell<bool>,
    pub(crate) flush_timer: Cell<bool>,
    pub(crate) closing: Cell<bool>,
    pub(crate) counters: Counters,
}

/// A handle to a shard; clones are the same shard.
pub struct Shard<H: Host>(pub(crate) Rc<Inner<H>>);

impl<H: Host> Clone for Shard<H> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<H: Host> Shard<H> {
    /// Opens a shard on partitions that recovery brought back, and starts its tasks.
    ///
    /// # Errors
    /// Any failure of the disk.
    pub async fn open(host: H, config: ShardConfig) -> Result<Self, StorageError> {
        let journal = Journal::open(
            host.clone(),
            JournalConfig {
                dir: config.journal_dir(),
                shard: config.shard,
                incarnation: config.incarnation,
                slot_bytes: config.journal_slot_bytes,
                slots: config.journal_slots,
                group_bytes_max: (1 << 20).min(config.journal_slot_bytes / 4),
            },
        )
        .await?;
        let removed = layout::removed_dir(&config.dir);
        let removal = Removal::open(host.clone(), removed, config.shard, config.incarnation).await?;
        let indexes = config.read_cache_bytes / INDEX_SHARE;
        let shard = Self(Rc::new(Inner {
            removal,
            leaving: RefCell::default(),
            clearing: RefCell::default(),
            clearing_changed: WaitList::default(),
            cleared: RefCell::default(),
            journal,
            files: FileCache::new(host.clone(), config.logs_dir(), config.open_files),
            read_cache: ReadCache::new(config.read_cache_bytes - indexes),
            index_cache: IndexCache::new(indexes),
            completing_index: Cell::new(false),
            queue: Budget::new(config.queue_bytes),
            pace: Pace::default(),
            reading: Budget::new(read::READS_IN_USE),
            arena: Arena::new(config.tail_bytes),
            host,
            partitions: RefCell::default(),
            tail_order: RefCell::default(),
            tail_bytes: Cell::new(0),
            producers: Cell::new(0),
            dirty: RefCell::default(),
            writeback_wanted: Cell::new(false),
            writeback_signal: WaitList::default(),
            writeback_done: WaitList::default(),
            writeback_running: Cell::new(false),
            carries: Cell::new(false),
            checkpointed: Cell::new(Position::START),
            poisoned: RefCell::default(),
            disk_free: Cell::new(0),
            disk_full: Cell::new(false),
            flush_timer: Cell::new(false),
            closing: Cell::new(false),
            counters: Counters::default(),
            config,
        }));
        shard.check_disk_room();
        let host = shard.0.host.clone();
        let s = shard.clone();
        host.spawn(async move { s.write_back_loop().await });
        let s = shard.clone();
        host.spawn(async move { s.removal_loop().await });
        let s = shard.clone();
        host.spawn(async move {
            while !s.0.closing.get() {
                let chunk = s.0.arena.next_wanted().await;
                s.0.arena.add(s.0.host.aside(|| arena::touched(chunk)).await);
            }
        });
        let s = shard.clone();
        host.spawn(async move {
            let mut is_told = false;
            while !s.0.closing.get() {
                let reason = match s.0.journal.grow(s.disk_room()).await {
                    Ok(Grown::Whole) => return,
                    Ok(Grown::InPart) => continue,
                    Ok(Grown::NoRoom) => "the disk has no room for more".to_owned(),
                    Err(error) => error.to_string(),
                };
                if !std::mem::replace(&mut is_told, true) {
                    tracing::warn!(
                        shard = s.0.config.shard,
                        reason,
                        "the journal stays smaller than configured until that is mended"
                    );
                }
                s.0.host.sleep(GROW_RETRY).await;
            }
        });
        Ok(shard)
    }

    /// The task that writes the journal; run it with the priority of the foreground. Ends when the shard is
    /// closed or poisoned.
    pub async fn run_commits(&self) {
        self.commit_loop().await;
    }

    /// Takes in a partition: one that recovery brought back, or a new one.
    pub fn add_partition(&self, state: LogState, config: LogConfig) {
        let key = state.key;
        if let Entry::Vacant(place) = self.0.partitions.borrow_mut().entry(key) {
            let partition = place.insert(Rc::new(Partition::new(state, config)));
            self.count_producers(partition);
        }
    }

    /// A partition of this shard.
    #[must_use]
    pub fn partition(&self, key: &PartitionKey) -> Option<Rc<Partition>> {
        self.0.partitions.borrow().get(key).cloned()
    }

    /// All partitions of this shard.
    #[must_use]
    pub fn partitions(&self) -> Vec<Rc<Partition>> {
        self.0.partitions.borrow().values().cloned().collect()
    }

    /// Waits for room in the queue of appends, in the order of the calls.
    pub async fn admit(&self, bytes: usize) -> Permit {
        self.0.queue.acquire(bytes as u64).await
    }

    /// Counters since the start.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.0.counters
    }

    /// Bytes of the journal in use, of so many.
    #[must_use]
    pub fn journal_usage(&self) -> (u64, u64) {
        self.0.journal.usage()
    }

    /// Bytes of batches and of read pieces in memory.
    #[must_use]
    pub fn memory(&self) -> (usize, usize) {
        (self.0.tail_bytes.get(), self.0.read_cache.held())
    }

    /// The failure that took the whole shard offline, if one did.
    #[must_use]
    pub fn poisoned(&self) -> Option<String> {
        self.0.poisoned.borrow().clone()
    }

    /// # Errors
    /// [`StorageError::Poisoned`] once the journal has failed.
    pub(crate) fn check_healthy(&self) -> Result<(), StorageError> {
        match &*self.0.poisoned.borrow() {
            Some(stage) => Err(StorageError::Poisoned { stage: stage.clone() }),
            None => Ok(()),
        }
    }

    pub(crate) fn poison_shard(&self, stage: &StorageError) {
        tracing::error!(shard = self.0.config.shard, error = %stage, "the shard is offline: its journal failed; restart the broker after the disk is mended");
        *self.0.poisoned.borrow_mut() = Some(stage.to_string());
        for partition in self.partitions() {
            partition.poison(&stage.to_string());
        }
        self.0.writeback_done.wake_all();
        self.0.clearing_changed.wake_all();
    }

    /// Writes everything to segments and a checkpoint, so that the next start has nothing to replay. Appends
    /// must have ended.
    ///
    /// # Errors
    /// Any failure of the disk.
    pub async fn close(&self) -> Result<(), StorageError> {
        self.clear_rest().await;
        match self.flush_all().await {
            Err(error) if error.is_disk_full() => {
                self.0.journal.flush().await?;
                tracing::warn!(
                    shard = self.0.config.shard,
                    %error,
                    "the disk is full: what is not in segments stays in the journal, and is written at the next start"
                );
            }
            flushed => flushed?,
        }
        self.store_active_indexes().await;
        self.shorten_active_segments().await;
        self.remove_leaving().await;
        self.0.closing.set(true);
        self.0.writeback_signal.wake_all();
        self.0.removal.wake();
        Ok(())
    }

    /// Bytes that clients may still append before the disk is asked again.
    pub(crate) fn disk_room(&self) -> u64 {
        self.0.disk_free.get().saturating_sub(self.0.config.free_bytes_min)
    }

    /// Asks the disk how much room is left; called now and then and after write-back.
    pub(crate) fn check_disk_room(&self) {
        let inner = &self.0;
        match inner.host.free_space(&inner.config.dir) {
            Ok(free) => {
                inner.disk_free.set(free);
                let full = self.disk_room() == 0;
                if full != inner.disk_full.replace(full) {
                    if full {
                        tracing::error!(
                            shard = inner.config.shard,
                            free_bytes = free,
                            needed_bytes = inner.config.free_bytes_min,
                            "the disk is full: clients' appends are refused until room returns, reads go on; free some room, or delete \
                             topics"
                        );
                    } else {
                        tracing::info!(shard = inner.config.shard, free_bytes = free, "the disk has room again");
                    }
                }
            }
            Err(error) => tracing::warn!(shard = inner.config.shard, %error, "cannot ask for free space"),
        }
    }

    /// Once a second, for as long as the shard lives: free space, expiry of producers and retention.
    pub async fn run_housekeeping(&self) {
        let mut round = 0_u64;
        let retention_check = (self.0.config.retention_check.as_millis() as u64)
            .div_ceil(1_000)
            .max(1);
        while !self.0.closing.get() {
            self.0.host.sleep(Duration::from_secs(1)).await;
            self.check_disk_room();
            self.0.arena.give_back();
            // What a checkpoint says of where partitions are holds over the next start.
            if round == 0
                && self.0.checkpointed.get() == Position::START
                && let Err(error) = self.checkpoint_again().await
            {
                tracing::warn!(shard = self.0.config.shard, %error, "no checkpoint could be stored");
            }
            round += 1;
            if round.is_multiple_of(retention_check) {
                self.apply_retention().await;
            }
        }
    }
}
