//! A partition as its shard holds it: the log's state, the batches in memory, and who waits.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    sync::Arc,
};

use crate::{
    batch::{Batch, BatchHeader, RecordKind},
    checkpoint::Captured,
    error::StorageError,
    index::SegmentIndex,
    journal::Entry,
    log::{LogConfig, LogState, SegmentMeta},
    paged::PagedDeque,
    shard::commit::Completion,
    sync::WaitList,
    types::{LeaderEpoch, Offset, PartitionKey},
};

/// Bytes whose handling takes a core about as long as what comes with every request, however small.
pub const REQUEST_WORK: u64 = 16 << 10;
/// Memory that a batch in the tail takes beside its payload.
pub(crate) const TAIL_OVERHEAD: usize = 256;

pub(crate) struct TailEntry {
    pub batch: Batch,
    /// In its segment, durably.
    pub written: bool,
}

/// Appends behind a large batch that is on its way to the segment wait here, so that the journal sees the
/// partition's batches in the order of their offsets.
#[derive(Default)]
pub(crate) struct Gate {
    pub entries: VecDeque<Gated>,
    pub running: bool,
}

pub(crate) struct Gated {
    pub entry: Entry<Completion>,
    /// `Some(false)` while a large batch is being written, `None` for entries that only wait.
    pub written: Option<bool>,
}

/// Where a sequential reader left off.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cursor {
    pub offset: Offset,
    pub base: Offset,
    pub position: u64,
}

/// One partition.
///
/// Invariant: `tail` holds contiguous offsets that end at the log end offset; what is below its first is in segments.
pub struct Partition {
    /// Which.
    pub key: PartitionKey,
    pub(crate) state: RefCell<LogState>,
    pub(crate) config: Cell<LogConfig>,
    pub(crate) tail: RefCell<PagedDeque<TailEntry>>,
    pub(crate) gate: RefCell<Gate>,
    pub(crate) changed: WaitList,
    pub(crate) poisoned: RefCell<Option<String>>,
    /// Deleted, or moved to another shard.
    pub(crate) deleted: Cell<bool>,
    /// Work done for it, see [`work`](Partition::work).
    pub(crate) work: Cell<u64>,
    /// On its way to another shard: the log does not change meanwhile.
    pub(crate) moving: Cell<bool>,
    /// The high watermark is what the replicas agree on, and follows our own durable end no more.
    pub(crate) replicated: Cell<bool>,
    pub(crate) dirty: Cell<bool>,
    /// Everything below is in segments; some above may be too. Where write-back begins to look.
    pub(crate) unwritten_from: Cell<Offset>,
    /// The state as of when all of it was last in segments: what a checkpoint says.
    pub(crate) in_segments: RefCell<Arc<Captured>>,
    /// Batches that are not in [`in_segments`](Self::in_segments) yet and need not be written, without payloads: large ones that went
    /// straight to their segments, and those of segments that were removed. If a pass fails they are to be said again in the journal.
    pub(crate) extents: RefCell<Vec<BatchHeader>>,
    /// Moves of the log start, and cuts, that are not in it either.
    pub(crate) marks: RefCell<Vec<BatchHeader>>,
    pub(crate) unflushed_messages: Cell<i64>,
    /// Producers that the shard counts as remembered here.
    pub(crate) producers: Cell<usize>,
    /// The log says that records of the future hold up retention.
    pub(crate) told_of_the_future: Cell<bool>,
    /// How often the log was cut.
    pub(crate) cuts: Cell<u64>,
    /// Index of the segment appended to.
    pub(crate) active_index: RefCell<Option<(Offset, SegmentIndex)>>,
    /// Up to which position of the segment appended to its index file goes; where appends began if there may be none.
    pub(crate) index_stored: Cell<u64>,
    /// Indexes of segments that were closed and whose index file is not written yet.
    pub(crate) sealed_indexes: RefCell<Vec<(Offset, SegmentIndex)>>,
    pub(crate) cursors: RefCell<VecDeque<Cursor>>,
}

/// What a partition looks like from outside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PartitionStatus {
    /// First offset that can be read.
    pub log_start: Offset,
    /// Offset behind the last one consumers may see.
    pub high_watermark: Offset,
    /// Offset behind the last one that is durable here.
    pub durable_end: Offset,
    /// Next offset to be assigned.
    pub log_end: Offset,
    /// The last leader epoch that wrote, -1 for none.
    pub latest_epoch: LeaderEpoch,
}

/// A segment as it was when somebody began to read it.
#[derive(Clone, Copy)]
pub(crate) struct Seen {
    pub meta: SegmentMeta,
    /// How often the log had been cut.
    pub cuts: u64,
}

impl Seen {
    /// The same up to a position.
    pub fn until(self, end: u64) -> Self {
        Self {
            meta: self.meta.until(end),
            ..self
        }
    }
}

impl Partition {
    /// A segment of now.
    pub(crate) fn seen(&self, meta: SegmentMeta) -> Seen {
        let cuts = self.cuts.get();
        Seen { meta, cuts }
    }

    /// Where a segment ends to which nothing will be appended any more; `None` for the one that takes appends.
    pub(crate) fn sealed_end(&self, base: Offset) -> Option<u64> {
        let state = self.state.borrow();
        let (_, sealed) = state.segments().split_last()?;
        let at = sealed.binary_search_by_key(&base, |s| s.base).ok()?;
        Some(sealed[at].end)
    }

    pub(crate) fn new(state: LogState, config: LogConfig) -> Self {
        Self {
            key: state.key,
            in_segments: RefCell::new(Arc::new(Captured::of(&state))),
            state: RefCell::new(state),
            config: Cell::new(config),
            tail: RefCell::default(),
            gate: RefCell::default(),
            changed: WaitList::default(),
            poisoned: RefCell::default(),
            deleted: Cell::new(false),
            work: Cell::new(0),
            moving: Cell::new(false),
            replicated: Cell::new(false),
            dirty: Cell::new(false),
            unwritten_from: Cell::new(0),
            extents: RefCell::default(),
            marks: RefCell::default(),
            unflushed_messages: Cell::new(0),
            producers: Cell::new(0),
            told_of_the_future: Cell::new(false),
            cuts: Cell::new(0),
            active_index: RefCell::default(),
            index_stored: Cell::new(0),
            sealed_indexes: RefCell::default(),
            cursors: RefCell::default(),
        }
    }

    /// Offsets now.
    #[must_use]
    pub fn status(&self) -> PartitionStatus {
        let state = self.state.borrow();
        PartitionStatus {
            log_start: state.log_start(),
            high_watermark: state.high_watermark(),
            durable_end: state.durable_end(),
            log_end: state.log_end(),
            latest_epoch: state.epochs.latest().unwrap_or(-1),
        }
    }

    /// Bytes of its segments.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.state.borrow().size_bytes()
    }

    /// Work done for it since it is on this shard: bytes appended and read, and as many again as [`REQUEST_WORK`] for each time.
    #[must_use]
    pub fn work(&self) -> u64 {
        self.work.get()
    }

    pub(crate) fn note_work(&self, bytes: usize) {
        self.work.set(self.work.get() + REQUEST_WORK + bytes as u64);
    }

    /// The log's decisions, to look at.
    pub fn with_state<T>(&self, look: impl FnOnce(&LogState) -> T) -> T {
        look(&self.state.borrow())
    }

    /// Settings in force.
    #[must_use]
    pub fn config(&self) -> LogConfig {
        self.config.get()
    }

    /// Changes the settings; they hold from the next append.
    pub fn set_config(&self, config: LogConfig) {
        self.config.set(config);
    }

    /// Whether a large batch below `end` is still on its way to the segment.
    pub(crate) fn is_writing_below(&self, end: Offset) -> bool {
        self.gate
            .borrow()
            .entries
            .iter()
            .any(|g| g.written == Some(false) && g.entry.batch.header.base_offset < end)
    }

    pub(crate) fn poison(&self, stage: &str) {
        self.poisoned.borrow_mut().get_or_insert_with(|| stage.to_owned());
        self.changed.wake_all();
    }

    /// # Errors
    /// [`StorageError::Left`].
    pub(crate) fn check_here(&self) -> Result<(), StorageError> {
        match self.deleted.get() {
            true => Err(StorageError::Left),
            false => Ok(()),
        }
    }

    /// # Errors
    /// [`StorageError::Poisoned`] once a write or flush has failed.
    pub fn check_healthy(&self) -> Result<(), StorageError> {
        match &*self.poisoned.borrow() {
            Some(stage) => Err(StorageError::Poisoned { stage: stage.clone() }),
            None => Ok(()),
        }
    }

    /// Fails if what is waited for will not come any more.
    ///
    /// # Errors
    /// [`StorageError::Poisoned`], [`StorageError::Left`].
    pub(crate) fn check_lasting(&self) -> Result<(), StorageError> {
        self.check_healthy()?;
        self.check_here()
    }

    /// Fails unless the log may change.
    ///
    /// # Errors
    /// [`StorageError::Poisoned`], [`StorageError::Left`], and [`StorageError::Moving`] while another shard takes the partition over.
    pub fn check_writable(&self) -> Result<(), StorageError> {
        self.check_lasting()?;
        if self.moving.get() {
            return Err(StorageError::Moving);
        }
        Ok(())
    }

    /// Waits until everything below `end` is as durable as the flush policy asks, on every replica in sync.
    ///
    /// # Errors
    /// [`StorageError::Poisoned`] if the disk failed before that, [`StorageError::Left`].
    pub async fn wait_high_watermark(&self, end: Offset) -> Result<(), StorageError> {
        self.wait_for(|state| state.high_watermark() >= end).await
    }

    /// Waits until everything below `end` is as durable here as the flush policy asks.
    ///
    /// # Errors
    /// [`StorageError::Poisoned`] if the disk failed before that, [`StorageError::Left`].
    pub async fn wait_durable(&self, end: Offset) -> Result<(), StorageError> {
        self.wait_for(|state| state.durable_end() >= end).await
    }

    async fn wait_for(&self, reached: impl Fn(&LogState) -> bool) -> Result<(), StorageError> {
        self.changed
            .wait(|| {
                if reached(&self.state.borrow()) {
                    return Some(Ok(()));
                }
                self.check_lasting().err().map(Err)
            })
            .await
    }

    /// Whether it is on its way to another shard, or was when that failed: its log must not change.
    #[must_use]
    pub fn is_moving(&self) -> bool {
        self.moving.get()
    }

    /// Waits for the next change: high watermark, log start, failure or deletion. For futures that wait on many
    /// partitions at once: look, register with [`WaitList::place`], wait.
    #[must_use]
    pub fn changes(&self) -> &WaitList {
        &self.changed
    }

    /// Whether the partition was deleted under whoever still holds it, or moved to another shard.
    #[must_use]
    pub fn is_deleted(&self) -> bool {
        self.deleted.get()
    }

    /// Bytes of batches in memory between `offset` and the high watermark, counted until they are `enough`; a lower bound
    /// of what a read would give.
    #[must_use]
    pub fn bytes_available(&self, offset: Offset, enough: u64) -> u64 {
        let state = self.state.borrow();
        let hw = state.high_watermark();
        if offset >= hw {
            return 0;
        }
        let tail = self.tail.borrow();
        let from = tail.partition_point(|e| e.batch.header.last_offset < offset);
        let mut in_tail = 0;
        for entry in tail.iter_from(from).take_while(|e| e.batch.header.last_offset < hw) {
            in_tail += u64::from(entry.batch.header.payload_len);
            if in_tail >= enough {
                break;
            }
        }
        match tail.front() {
            Some(first) if first.batch.header.base_offset <= offset => in_tail,
            // What lies in segments is not counted batch by batch; it is there, and that is enough to answer.
            _ => in_tail + (1 << 20),
        }
    }

    /// Whether a read at `offset` finds what it gives in memory.
    #[must_use]
    pub fn is_in_memory(&self, offset: Offset) -> bool {
        (self.tail.borrow().front()).is_some_and(|first| first.batch.header.base_offset <= offset)
    }

    /// Works on the index of a segment that has no index file yet.
    pub(crate) fn in_memory_index<T>(&self, base: Offset, work: impl FnOnce(&mut SegmentIndex) -> T) -> Option<T> {
        let mut active = self.active_index.borrow_mut();
        let mut sealed = self.sealed_indexes.borrow_mut();
        let (_, index) = active.iter_mut().chain(sealed.iter_mut()).find(|(b, _)| *b == base)?;
        Some(work(index))
    }

    /// Notes a batch in the index of its segment.
    pub(crate) fn note_in_index(&self, batch: &Batch, restarted_at: Option<u64>) {
        debug_assert_eq!(batch.header.kind, RecordKind::Batch);
        let mut active = self.active_index.borrow_mut();
        let base = batch.header.segment_base;
        match &mut *active {
            Some((b, index)) if *b == base => index.note(&batch.header),
            _ => {
                let mut index = SegmentIndex::new(restarted_at.unwrap_or(crate::layout::BLOCK));
                self.index_stored.set(index.complete_from);
                index.note(&batch.header);
                if let Some(closed) = active.replace((base, index)) {
                    self.sealed_indexes.borrow_mut().push(closed);
                }
            }
        }
    }
}

/// Headers of the batches of one segment that are in memory. They are its last ones, and may not be in the segment yet.
pub(crate) fn in_memory(tail: &PagedDeque<TailEntry>, base: Offset) -> impl Iterator<Item = &BatchHeader> {
    let first = tail.partition_point(|e| e.batch.header.segment_base < base);
    (tail.iter_from(first).map(|e| &e.batch.header)).take_while(move |h| h.segment_base == base)
}
