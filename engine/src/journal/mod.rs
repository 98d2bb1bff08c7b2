//! The shard journal: one place where all partitions of a shard become durable together.
//!
//! Appends of every partition gather in a queue; whenever fewer than [`WRITES_MAX`] writes are in flight, what has gathered
//! goes out as one group, written to prewritten blocks and flushed (group commit, no linger). Groups count in their order,
//! whichever write is through first. Files are used as a ring ([`ring`]); once the segments hold what a file carried, it is
//! used again under a new sequence number.
//!
//! [`format`](mod@format) says what a group looks like, [`replay`] reads them back after a crash.

pub mod format;
pub mod replay;
pub mod ring;

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, VecDeque},
    io,
    path::{Path, PathBuf},
    rc::Rc,
};

use crate::{
    batch::{Batch, RecordKind},
    checksum,
    error::StorageError,
    host::{Host, HostFile, OpenMode, SharedFile},
    journal::{format::GroupHeader, ring::Ring},
    layout::{BLOCK, FileHeader, FileKind},
    stream,
    sync::{Permit, WaitList},
};

pub use ring::Position;

/// Sizes of a shard's journal.
#[derive(Clone, Debug)]
pub struct JournalConfig {
    /// Folder of the journals of all shards.
    pub dir: PathBuf,
    /// Whose journal.
    pub shard: u32,
    /// The start of the broker it belongs to: groups of another one are not read.
    pub incarnation: u64,
    /// Bytes of one file.
    pub slot_bytes: u64,
    /// Files of the ring; the first is there before the first append, the rest are added in the background.
    pub slots: u32,
    /// Most bytes in one group.
    pub group_bytes_max: u64,
}

/// Something to be made durable, and what is held until it is.
pub struct Entry<C> {
    /// Header and payload; the header's kind says how much of it goes into the journal.
    pub batch: Batch,
    /// Whether its acknowledgement waits for a flush.
    pub must_flush: bool,
    /// Handed back when done.
    pub context: C,
    /// Room in the shard's queue.
    pub permit: Option<Rc<Permit>>,
}

/// What one write carries.
pub struct Group<C> {
    /// In the order of the queue.
    pub entries: Vec<Entry<C>>,
    /// Encoded length, blocks.
    bytes: u64,
    /// At least one entry asks for a flush.
    must_flush: bool,
}

/// A group whose write is through; it counts when those before it are [`finish`](Journal::finish)ed.
#[derive(Clone, Copy, Debug)]
pub struct Written {
    end: Position,
    slot: u32,
    flushed: bool,
}

/// How a group goes to the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// Flushed as it is written. Others that are may be in flight meanwhile.
    Flushed,
    /// Not flushed. Others that are not may be in flight meanwhile.
    Unflushed,
    /// With nothing else in flight.
    Alone,
}

/// The driver of one shard's journal.
pub struct Journal<H: Host, C> {
    host: H,
    config: JournalConfig,
    ring: RefCell<Ring>,
    files: RefCell<HashMap<u32, SharedFile<H>>>,
    queue: RefCell<VecDeque<Entry<C>>>,
    queue_bytes: Cell<u64>,
    queued: WaitList,
    ring_changed: WaitList,
    /// Everything below is known to be flushed.
    flushed: Cell<Position>,
    /// Behind the last group written of which nothing before is missing.
    written: Cell<Position>,
    written_changed: WaitList,
    /// Behind the last group that has its place.
    placed: Cell<Position>,
    /// A group waits for room in the ring.
    wants_room: Cell<bool>,
    /// Slot written to last, if it holds unflushed groups.
    unflushed_slot: Cell<Option<u32>>,
    /// When a group was last written, ms.
    used_ms: Cell<i64>,
}

/// Groups in flight at a time: an append that comes while a write is under way need not wait for it.
pub const WRITES_MAX: usize = 2;

/// Journal bytes after which write-back begins, if half of the ring is not less.
const WRITE_BACK_BYTES: u64 = 12 << 20;

/// The same for each partition that would be written.
const PARTITION_BYTES: u64 = 32 << 10;

/// Time after a group in which the next one is expected.
const IN_USE_MS: u64 = 50;

/// What has become of a wish for another slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Grown {
    /// There are all.
    Whole,
    /// There is one more, and more are missing.
    InPart,
    /// The disk has no room for it.
    NoRoom,
}

/// Name of a ring file.
#[must_use]
pub fn slot_path(dir: &Path, shard: u32, slot: u32) -> PathBuf {
    dir.join(format!("{shard:04}-{slot:04}.journal"))
}

/// Shard and number of a ring file, by its name.
fn parse_slot_name(name: &str) -> Option<(u32, u32)> {
    let (shard, slot) = name.strip_suffix(".journal")?.split_once('-')?;
    Some((shard.parse().ok()?, slot.parse().ok()?))
}

fn io_error(operation: &'static str, path: PathBuf, source: io::Error) -> StorageError {
    StorageError::Io {
        operation,
        path,
        source,
    }
}

impl<H: Host, C> Journal<H, C> {
    /// Makes the first slot ready. Whatever the files hold must have been replayed: it is overwritten.
    ///
    /// # Errors
    /// Any failure of the disk.
    pub async fn open(host: H, config: JournalConfig) -> Result<Self, StorageError> {
        host.create_dir(&config.dir)
            .await
            .map_err(|e| io_error("create", config.dir.clone(), e))?;
        let journal = Self {
            ring: RefCell::new(Ring::new(config.slot_bytes)),
            host,
            config,
            files: RefCell::default(),
            queue: RefCell::default(),
            queue_bytes: Cell::new(0),
            queued: WaitList::default(),
            ring_changed: WaitList::default(),
            flushed: Cell::new(Position::START),
            written: Cell::new(Position::START),
            written_changed: WaitList::default(),
            placed: Cell::new(Position::START),
            wants_room: Cell::new(false),
            unflushed_slot: Cell::new(None),
            used_ms: Cell::new(i64::MIN),
        };
        journal.add_slot(0, u64::MAX).await?;
        Ok(journal)
    }

    /// Prewrites one file and adds it to the ring; false if that takes more than `room`. A file of the right length that says whose
    /// it is is taken as it is: its blocks have been written, which is all that is asked of them. Whoever wrote them may have been
    /// killed before they and the file's name were durable.
    async fn add_slot(&self, slot: u32, room: u64) -> Result<bool, StorageError> {
        let path = slot_path(&self.config.dir, self.config.shard, slot);
        let fail = |operation| {
            let path = path.clone();
            move |e| io_error(operation, path, e)
        };
        let file = self.host.open(&path, OpenMode::Durable).await.map_err(fail("open"))?;
        let header = FileHeader {
            kind: FileKind::Journal,
            topic: uuid::Uuid::nil(),
            number: self.config.shard,
            base: i64::from(slot),
        };
        let mut is_made = file.size().await.map_err(fail("stat"))? == self.config.slot_bytes;
        if is_made {
            let first = file.read_at(0, BLOCK as usize).await.map_err(fail("read"))?;
            is_made = FileHeader::decode(&first, FileKind::Journal, &path).is_ok_and(|found| found == header);
        }
        if !is_made {
            file.truncate(0).await.map_err(fail("truncate"))?;
            if room < self.config.slot_bytes {
                return Ok(false);
            }
            if let Err(error) = self.prewrite(&file, header).await {
                // Half a file is of no use, and takes the room that others may need.
                let _ = file.truncate(0).await;
                return Err(fail("prewrite")(error));
            }
        }
        file.flush().await.map_err(fail("flush"))?;
        (self.host.sync_dir(&self.config.dir).await).map_err(fail("sync folder of"))?;
        self.files.borrow_mut().insert(slot, Rc::new(file));
        self.ring.borrow_mut().add_slot(slot);
        self.ring_changed.wake_all();
        Ok(true)
    }

    async fn prewrite(&self, file: &H::File, header: FileHeader) -> io::Result<()> {
        let mut at = 0;
        while at < self.config.slot_bytes {
            let len = (self.config.slot_bytes - at).min(1 << 20);
            let mut buf = self.host.buffer(len as usize);
            buf.fill(0);
            if at == 0 {
                header.encode(&mut buf);
            }
            file.write_at(buf, at).await?;
            at += len;
        }
        Ok(())
    }

    /// Adds the next slot that is missing, if it takes no more than `room`; run in the background after [`open`](Self::open), until
    /// there are all.
    ///
    /// # Errors
    /// Any failure of the disk. The ring goes on with the slots it has; with only one it stops when that is full.
    pub async fn grow(&self, room: u64) -> Result<Grown, StorageError> {
        let slot = self.files.borrow().len() as u32;
        if slot < self.config.slots && !self.add_slot(slot, room).await? {
            return Ok(Grown::NoRoom);
        }
        Ok(match slot + 1 < self.config.slots {
            true => Grown::InPart,
            false => Grown::Whole,
        })
    }

    /// Queues an entry; entries become durable in the order of these calls.
    pub fn push(&self, entry: Entry<C>) {
        let bytes = entry.batch.header.journal_len();
        self.queue_bytes.set(self.queue_bytes.get() + bytes);
        self.queue.borrow_mut().push_back(entry);
        self.queued.wake_all();
    }

    /// Waits for entries and takes as many as one group holds.
    pub async fn next_group(&self) -> Group<C> {
        self.queued
            .wait(|| (!self.queue.borrow().is_empty()).then_some(()))
            .await;
        let mut queue = self.queue.borrow_mut();
        let mut body = 0;
        let mut entries = Vec::with_capacity(queue.len().min(256));
        let mut must_flush = false;
        while let Some(next) = queue.front() {
            let len = next.batch.header.journal_len();
            if !entries.is_empty() && body + len > self.config.group_bytes_max {
                break;
            }
            body += len;
            must_flush |= next.must_flush;
            entries.extend(queue.pop_front());
        }
        self.queue_bytes.set(self.queue_bytes.get() - body);
        Group {
            entries,
            bytes: GroupHeader::group_len(body),
            must_flush,
        }
    }

    /// How a group goes to the disk if it goes now.
    #[must_use]
    pub fn way(&self, group: &Group<C>) -> Way {
        if self.wants_room.get() {
            // The order of places must be that of the queue.
            Way::Alone
        } else if !group.must_flush {
            Way::Unflushed
        } else if self.flushes_at_once(group) {
            Way::Flushed
        } else {
            Way::Alone
        }
    }

    fn flushes_at_once(&self, group: &Group<C>) -> bool {
        group.must_flush && self.unflushed_slot.get().is_none()
    }

    /// Writes a group, waiting for room in the ring, and flushes it if any of its entries asks. Groups have their places in the
    /// order in which these futures are first polled.
    ///
    /// # Errors
    /// A failed write or flush: the journal must not be used any more.
    pub async fn write(&self, group: &Group<C>) -> Result<Written, StorageError> {
        let place = self.ring.borrow_mut().place(group.bytes);
        let place = match place {
            Some(place) => place,
            None => {
                self.wants_room.set(true);
                let place = self.ring_changed.wait(|| self.ring.borrow_mut().place(group.bytes));
                let place = place.await;
                self.wants_room.set(false);
                place
            }
        };
        let end = Position {
            seq: place.position.seq,
            offset: place.position.offset + group.bytes,
        };
        let before = self.placed.replace(end);
        if before.seq != end.seq {
            // The first group of a file says where the one before ended.
            self.written_changed
                .wait(|| (self.written.get() == before).then_some(()))
                .await;
        }
        self.used_ms.set(self.host.now_ms());
        if let Some(old) = self.unflushed_slot.get()
            && old != place.slot
        {
            // Replay tells the end of a file from damage by this.
            self.flush_slot(old, self.written.get()).await?;
        }
        let mut buf = self.host.buffer(group.bytes as usize);
        let (mut at, mut body_crc) = (format::HEADER_LEN, 0);
        for entry in &group.entries {
            let header = &entry.batch.header;
            let len = header.journal_len() as usize;
            let out = &mut buf[at..at + len];
            let (head, rest) = out.split_first_chunk_mut().expect("journal_len is at least a header's");
            header.encode(head);
            body_crc = crc32c::crc32c_append(body_crc, head);
            if header.kind == RecordKind::Batch {
                let (payload, pad) = rest.split_at_mut(entry.batch.payload.len());
                stream::copy(payload, &entry.batch.payload);
                pad.fill(0);
                body_crc = checksum::append(body_crc, payload, header.payload_crc);
                body_crc = crc32c::crc32c_append(body_crc, pad);
            }
            at += len;
        }
        buf[at..].fill(0);
        debug_assert_eq!(
            body_crc,
            crc32c::crc32c(&buf[format::HEADER_LEN..at]),
            "a header states another checksum than its payload has"
        );
        GroupHeader {
            incarnation: self.config.incarnation,
            shard: self.config.shard,
            position: place.position,
            flushed: self.flushed.get(),
            body_len: u32::try_from(at - format::HEADER_LEN).expect("a group is bounded by the journal's slot"),
            record_count: u32::try_from(group.entries.len()).expect("each entry takes bytes of the group"),
            body_crc,
        }
        .encode(&mut buf);
        let file = Rc::clone(&self.files.borrow()[&place.slot]);
        let failed = |operation, error| {
            let path = slot_path(&self.config.dir, self.config.shard, place.slot);
            io_error(operation, path, error)
        };
        let written = Written {
            end,
            slot: place.slot,
            flushed: group.must_flush,
        };
        if self.flushes_at_once(group) {
            file.write_durable_at(buf, place.position.offset)
                .await
                .map_err(|e| failed("write and flush", e))?;
            return Ok(written);
        }
        file.write_at(buf, place.position.offset)
            .await
            .map_err(|e| failed("write", e))?;
        if group.must_flush {
            // Nothing else is in flight, so that this flushes all there is. What completes with it has not happened yet.
            self.unflushed_slot.set(Some(place.slot));
            self.flush_slot(place.slot, end).await?;
        }
        Ok(written)
    }

    /// The write of the oldest group in flight is through.
    pub fn finish(&self, written: Written) {
        self.written.set(written.end);
        if written.flushed {
            self.flushed.set(written.end);
        } else {
            self.unflushed_slot.set(Some(written.slot));
        }
        self.written_changed.wake_all();
    }

    /// Flushes a file; what was written before `mark` is flushed then.
    async fn flush_slot(&self, slot: u32, mark: Position) -> Result<(), StorageError> {
        let file = Rc::clone(&self.files.borrow()[&slot]);
        file.flush()
            .await
            .map_err(|e| io_error("flush", slot_path(&self.config.dir, self.config.shard, slot), e))?;
        // A write that finished meanwhile is not covered.
        if self.written.get() <= mark {
            self.unflushed_slot.set(None);
        }
        self.flushed.set(self.flushed.get().max(mark));
        Ok(())
    }

    /// Flushes what was written without.
    ///
    /// # Errors
    /// A failed flush: the journal must not be used any more.
    pub async fn flush(&self) -> Result<(), StorageError> {
        match self.unflushed_slot.get() {
            Some(slot) => self.flush_slot(slot, self.written.get()).await,
            None => Ok(()),
        }
    }

    /// Position behind the last group written; everything below has been completed.
    #[must_use]
    pub fn written(&self) -> Position {
        self.written.get()
    }

    /// Whether so much has been written that the segments of `partitions` should be: half of the ring, or enough for writes of a good
    /// size to each. Small and frequent passes disturb appends less than large and rare ones, but every partition costs a flush
    /// (kernel-notes.md).
    #[must_use]
    pub fn wants_write_back(&self, partitions: usize) -> bool {
        let ring = self.ring.borrow();
        let enough = WRITE_BACK_BYTES.max(partitions as u64 * PARTITION_BYTES);
        let is_half_full = ring.needed_bytes() > 0 && ring.used_bytes() > ring.capacity_bytes() / 2;
        ring.needed_bytes() > enough || is_half_full
    }

    /// Whether write-back is slower than appends: twice as much waits for it as makes it begin, or half of the ring.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        let ring = self.ring.borrow();
        ring.needed_bytes() > (2 * WRITE_BACK_BYTES).min(ring.capacity_bytes() / 2)
    }

    /// Whether groups were written a moment ago, so that others will follow.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        self.host.now_ms().abs_diff(self.used_ms.get()) < IN_USE_MS
    }

    /// Whether so little of the ring is left that appends may soon wait.
    #[must_use]
    pub fn is_tight(&self) -> bool {
        let ring = self.ring.borrow();
        ring.used_bytes() > ring.capacity_bytes() / 4 * 3
    }

    /// Whether a record of so many bytes fits one group, and at most half of the ring would be in use after it.
    #[must_use]
    pub fn has_plenty_of_room(&self, bytes: u64) -> bool {
        let ring = self.ring.borrow();
        let used = ring.used_bytes() + self.queue_bytes.get() + bytes;
        bytes <= self.config.group_bytes_max && used <= ring.capacity_bytes() / 2
    }

    /// Lets files be used again whose groups all lie before `tail`.
    pub fn release(&self, tail: Position) {
        self.ring.borrow_mut().release(tail);
        self.ring_changed.wake_all();
    }

    /// Bytes of the ring in use, of so many.
    #[must_use]
    pub fn usage(&self) -> (u64, u64) {
        let ring = self.ring.borrow();
        (ring.used_bytes(), ring.capacity_bytes())
    }

    /// Largest record it takes; what is larger can only be written straight to a segment.
    #[must_use]
    pub fn record_bytes_max(&self) -> u64 {
        self.config.slot_bytes - 2 * BLOCK
    }
}
