//! Segment files: their names, their headers, and how runs of batches become whole blocks.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    ops::Deref,
    path::{Path, PathBuf},
    rc::Rc,
};

use rustc_hash::FxHashSet;

use crate::{
    batch::Batch,
    error::StorageError,
    host::{Host, HostFile, OpenMode},
    layout::{BLOCK, FileHeader, FileKind},
    lru::Lru,
    sync::{Budget, Permit, WaitList},
    types::{Offset, PartitionKey, align_up},
};

/// Bytes written by one operation.
const PIECE: u64 = 1 << 20;
/// The same in the background: the journal's next write waits behind at most a few of these.
const PACED_PIECE: u64 = 128 << 10;
/// The same where that is not enough.
const PACED_PIECE_BEHIND: u64 = 512 << 10;
/// Pieces in flight: the disk sees the next one before it is done with the last.
const PACED_PIECES: u64 = 2;

/// How a shard writes in the background: in pieces, few at a time, and larger ones while more waits to be written than should.
pub struct Pace {
    /// Bytes of large pieces; those of small ones count for more, so that no more of them are in flight.
    room: Rc<Budget>,
    behind: Cell<bool>,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            room: Budget::new(PACED_PIECES * PACED_PIECE_BEHIND),
            behind: Cell::new(false),
        }
    }
}

impl Pace {
    /// Whether too much waits to be written.
    pub fn set_behind(&self, behind: bool) {
        self.behind.set(behind);
    }

    fn piece(&self) -> u64 {
        if self.behind.get() {
            PACED_PIECE_BEHIND
        } else {
            PACED_PIECE
        }
    }

    async fn enter(&self, bytes: u64) -> Permit {
        self.room.acquire(bytes * (PACED_PIECE_BEHIND / self.piece())).await
    }
}

/// Most room made ahead of what is written to a segment.
const AHEAD_MAX: u64 = 8 << 20;

/// An open segment file, which may be longer than what was written to it.
pub struct SegmentFile<F> {
    file: F,
    /// What it was made long, or would have been had the disk allowed it; unknown until somebody asks.
    len: Cell<Option<u64>>,
}

impl<F> Deref for SegmentFile<F> {
    type Target = F;
    fn deref(&self) -> &F {
        &self.file
    }
}

impl<F: HostFile> SegmentFile<F> {
    fn new(file: F) -> Self {
        Self {
            file,
            len: Cell::new(None),
        }
    }

    /// Sees to it that writes up to `end` find their room made, by making more than that: a quarter of what there is, so that
    /// small segments have little of it. Where the disk does not allow it, writes lengthen the file as they come.
    pub async fn make_room(&self, end: u64, ahead_max: u64) {
        let len = match self.len.get() {
            Some(len) => len,
            None => self.file.size().await.unwrap_or(0),
        };
        self.len.set(Some(len));
        if end > len {
            let len = align_up(end + (end / 4).min(AHEAD_MAX).min(ahead_max), BLOCK);
            self.len.set(Some(len));
            if let Err(error) = self.file.make_room(len).await {
                tracing::debug!(%error, len, "no room was made ahead in a segment");
            }
        }
    }

    /// Whether room was made beyond `end` since the file was opened.
    #[must_use]
    pub fn has_room_beyond(&self, end: u64) -> bool {
        self.len.get().is_some_and(|len| len > align_up(end, BLOCK))
    }

    /// Takes off what is beyond `len`.
    ///
    /// # Errors
    /// What the disk says.
    pub async fn shorten(&self, len: u64) -> std::io::Result<()> {
        if self.file.size().await? > len {
            self.file.truncate(len).await?;
        }
        self.len.set(Some(len));
        Ok(())
    }
}

/// Open segment files are shared by the tasks of a shard.
pub type SharedSegment<H> = Rc<SegmentFile<<H as Host>::File>>;

/// Folder of a topic's partitions.
#[must_use]
pub fn topic_dir(logs: &Path, key: &PartitionKey) -> PathBuf {
    logs.join(key.topic.simple().to_string())
}

/// Folder of one partition.
#[must_use]
pub fn partition_dir(logs: &Path, key: &PartitionKey) -> PathBuf {
    topic_dir(logs, key).join(key.partition.to_string())
}

/// File of a segment.
#[must_use]
pub fn segment_path(logs: &Path, key: &PartitionKey, base: Offset) -> PathBuf {
    partition_dir(logs, key).join(format!("{base:020}.segment"))
}

/// File of a sealed segment's index.
#[must_use]
pub fn index_path(logs: &Path, key: &PartitionKey, base: Offset) -> PathBuf {
    partition_dir(logs, key).join(format!("{base:020}.index"))
}

/// What to do about a segment whose file is not there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Missing {
    /// It is an error.
    Refuse,
    /// Make it, durably, with its folders.
    Make,
    /// Make it; the caller makes it durable ([`Host::sync_all`]).
    MakeUnsynced,
}

/// A segment of a partition.
type SegmentKey = (PartitionKey, Offset);

/// Open segment files of a shard, at most so many; the one used longest ago is closed for the next.
pub struct FileCache<H: Host> {
    host: H,
    logs: PathBuf,
    open: RefCell<Lru<SegmentKey, SharedSegment<H>>>,
    /// Being opened or made: others who want them wait, or they would write to a file whose name is not durable yet. Whether they were
    /// to be forgotten meanwhile: what was opened may be another file than the one that has the name now.
    opening: RefCell<BTreeMap<SegmentKey, bool>>,
    opened: WaitList,
    /// Made, and their names not known to be durable.
    unsynced: RefCell<BTreeSet<SegmentKey>>,
    /// Partitions whose folder was made durable, with its name and what was in it: a process that was killed may have made a file
    /// and not its name durable, whatever this one finds.
    synced_dirs: RefCell<FxHashSet<PartitionKey>>,
}

impl<H: Host> FileCache<H> {
    /// A cache for files under `logs`.
    #[must_use]
    pub fn new(host: H, logs: PathBuf, limit: usize) -> Self {
        Self {
            host,
            logs,
            open: RefCell::new(Lru::new(limit.max(1))),
            opening: RefCell::default(),
            opened: WaitList::default(),
            unsynced: RefCell::default(),
            synced_dirs: RefCell::default(),
        }
    }

    /// Folder of all logs.
    #[must_use]
    pub fn logs(&self) -> &Path {
        &self.logs
    }

    /// The file of a segment, opened if it is not.
    ///
    /// # Errors
    /// Any failure of the disk; [`StorageError::Left`] if the segment was [forgotten](Self::forget) before its file was made.
    pub async fn get(
        &self,
        key: PartitionKey,
        base: Offset,
        missing: Missing,
    ) -> Result<SharedSegment<H>, StorageError> {
        self.opened
            .wait(|| (!self.opening.borrow().contains_key(&(key, base))).then_some(()))
            .await;
        let known = self.open.borrow_mut().get(&(key, base)).cloned();
        let sync = missing == Missing::Make && !self.has_durable_name(key, base);
        if let Some(file) = known.as_ref().filter(|_| !sync) {
            return Ok(Rc::clone(file));
        }
        self.opening.borrow_mut().insert((key, base), false);
        let _turn = Turn {
            files: self,
            of: (key, base),
        };
        let path = segment_path(&self.logs, &key, base);
        let file = match known {
            Some(file) => file,
            None => match self.host.open(&path, OpenMode::Existing).await {
                Ok(file) => Rc::new(SegmentFile::new(file)),
                Err(e) if missing != Missing::Refuse && e.kind() == std::io::ErrorKind::NotFound => {
                    Rc::new(SegmentFile::new(self.create(key, base, &path).await?))
                }
                Err(e) => return Err(StorageError::io("open", &path)(e)),
            },
        };
        if missing == Missing::Make && !self.has_durable_name(key, base) {
            self.sync_name(key, base).await?;
            self.unsynced.borrow_mut().remove(&(key, base));
        }
        if !self.is_forgotten(key, base) {
            self.open.borrow_mut().insert((key, base), Rc::clone(&file), 1);
        }
        Ok(file)
    }

    /// Whether a file was to be forgotten since it is being opened.
    fn is_forgotten(&self, key: PartitionKey, base: Offset) -> bool {
        self.opening.borrow().get(&(key, base)).copied().unwrap_or(false)
    }

    fn has_durable_name(&self, key: PartitionKey, base: Offset) -> bool {
        self.synced_dirs.borrow().contains(&key) && !self.unsynced.borrow().contains(&(key, base))
    }

    /// Makes the file of a segment that is being opened, with its folders. Fails with [`StorageError::Left`] if it was to be forgotten
    /// before: its folder may be gone, and nobody would remove a new one.
    async fn create(&self, key: PartitionKey, base: Offset, path: &Path) -> Result<H::File, StorageError> {
        let dir = partition_dir(&self.logs, &key);
        let mut again = true;
        loop {
            if !self.is_forgotten(key, base) {
                let made = self.host.create_dir(&dir).await;
                made.map_err(StorageError::io("create", &dir))?;
            }
            if self.is_forgotten(key, base) {
                // They go only if nothing is in them.
                for dir in [&dir, &topic_dir(&self.logs, &key)] {
                    let _ = self.host.remove_dir(dir).await;
                }
                return Err(StorageError::Left);
            }
            self.unsynced.borrow_mut().insert((key, base));
            match self.host.open(path, OpenMode::Create).await {
                // Whoever was late for an earlier copy has removed the folder, as empty.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound && again => again = false,
                made => return made.map_err(StorageError::io("create", path)),
            }
        }
    }

    /// Makes the names in the folder of a partition durable, a segment of which is being opened, and that of the folder.
    async fn sync_name(&self, key: PartitionKey, base: Offset) -> Result<(), StorageError> {
        let dir = partition_dir(&self.logs, &key);
        self.host.sync_dir(&dir).await.map_err(StorageError::io("sync", &dir))?;
        if self.synced_dirs.borrow().contains(&key) {
            return Ok(());
        }
        for dir in [&topic_dir(&self.logs, &key), &self.logs] {
            self.host.sync_dir(dir).await.map_err(StorageError::io("sync", dir))?;
        }
        if !self.is_forgotten(key, base) {
            self.synced_dirs.borrow_mut().insert(key);
        }
        Ok(())
    }

    /// The file of a segment if it is open.
    #[must_use]
    pub fn opened(&self, key: PartitionKey, base: Offset) -> Option<SharedSegment<H>> {
        self.open.borrow().peek(&(key, base)).cloned()
    }

    /// Closes what is open of a partition, or one segment of it.
    pub fn forget(&self, key: PartitionKey, base: Option<Offset>) {
        let gone = (key, base.unwrap_or(Offset::MIN))..=(key, base.unwrap_or(Offset::MAX));
        self.open.borrow_mut().remove_range(gone.clone());
        (self.opening.borrow_mut().range_mut(gone.clone())).for_each(|(_, forgotten)| *forgotten = true);
        self.unsynced.borrow_mut().extract_if(gone, |_| true).for_each(drop);
        if base.is_none() {
            self.synced_dirs.borrow_mut().remove(&key);
        }
    }
}

/// Ends the wait of others for a file, however its opening ends.
struct Turn<'a, H: Host> {
    files: &'a FileCache<H>,
    of: SegmentKey,
}

impl<H: Host> Drop for Turn<'_, H> {
    fn drop(&mut self) {
        self.files.opening.borrow_mut().remove(&self.of);
        self.files.opened.wake_all();
    }
}

/// Writes batches that stand side by side in one segment, in whole blocks. The first begins on a block and
/// nothing else stands in the last one's. With `pace` the writes are as it says.
///
/// # Errors
/// Any failure of the disk; what was written is then unknown.
pub async fn write_run<H: Host>(
    host: &H,
    file: &H::File,
    path: &Path,
    run: &[Batch],
    pace: Option<&Pace>,
) -> Result<(), StorageError> {
    let (Some(first), Some(last)) = (run.first(), run.last()) else {
        return Ok(());
    };
    let start = first.header.segment_position;
    assert_eq!(start % BLOCK, 0, "{}: a run begins on a block", path.display());
    let end = align_up(last.header.segment_end(), BLOCK);
    // The segment's header goes out with its first batch.
    let mut at = if start == BLOCK { 0 } else { start };
    let mut next = 0;
    while at < end {
        let piece_end = (at + pace.map_or(PIECE, Pace::piece)).min(end);
        let _room = match pace {
            Some(pace) => Some(pace.enter(piece_end - at).await),
            None => None,
        };
        let mut buf = host.buffer((piece_end - at) as usize);
        if at == 0 {
            FileHeader {
                kind: FileKind::Segment,
                topic: first.header.key.topic,
                number: first.header.key.partition,
                base: first.header.segment_base,
            }
            .encode(&mut buf);
        }
        let mut filled = if at == 0 { BLOCK as usize } else { 0 };
        while let Some(batch) = run.get(next) {
            let (from, to) = (batch.header.segment_position, batch.header.segment_end());
            if from >= piece_end {
                break;
            }
            let (low, high) = (from.max(at), to.min(piece_end));
            let of_piece = (low - at) as usize..(high - at) as usize;
            assert_eq!(filled, of_piece.start, "{}: batches stand side by side", path.display());
            filled = of_piece.end;
            batch.encode_part((low - from) as usize, &mut buf[of_piece]);
            if to > piece_end {
                break;
            }
            next += 1;
        }
        buf[filled..].fill(0);
        file.write_at(buf, at).await.map_err(StorageError::io("write", path))?;
        at = piece_end;
    }
    Ok(())
}

/// Cuts batches of one partition into runs that stand side by side in one segment.
pub fn runs(batches: &[Batch]) -> impl Iterator<Item = &[Batch]> {
    batches.chunk_by(|a, b| {
        a.header.segment_base == b.header.segment_base && a.header.segment_end() == b.header.segment_position
    })
}
