//! A simulated disk and clock, seeded, for tests of recovery.
//!
//! Fault model. A write that has not been flushed is, after a power cut, for each of its blocks independently:
//! there, absent (what was there before), or torn (part old, part new). A flushed write is there. Creations,
//! removals and renames are durable once their folder is synced; before that a cut keeps or undoes
//! each. Operations begun at one time may be through in any order. They can be made to fail with EIO or ENOSPC, and flushed bytes
//! can be flipped (bit rot). The run can be cut
//! at any operation that changes the disk: from there on nothing completes, as if the power were gone.

mod contents;

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    future::{Future, pending, poll_fn},
    io,
    path::{Path, PathBuf},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::BytesMut;

use contents::{Inode, Submitted};

use crate::{
    host::{Host, HostFile, OpenMode},
    layout::BLOCK,
};

/// What buffers are full of before they are filled: not zeroes, so that bytes that nobody filled are noticed.
pub const UNFILLED: u8 = 0xa5;

/// A small, fast, seeded generator (splitmix64), so that a failure replays from its seed alone.
#[derive(Clone)]
pub struct SimRng(u64);

impl SimRng {
    /// A generator that gives the same numbers for the same seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next_u64() % n.max(1)
    }
}

/// What the next operations do instead of succeeding.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The `n`th changing operation from now (0 is the next) never completes, nor does any after it.
    CutAfter(u64),
    /// The `n`th write from now fails with EIO; nothing of it is written.
    WriteError(u64),
    /// The `n`th flush from now fails with EIO, and what it should have flushed is lost.
    FlushError(u64),
    /// Writes that would grow the disk beyond so many bytes fail with ENOSPC.
    Full(u64),
}

struct State {
    inodes: HashMap<u64, Inode>,
    next_inode: u64,
    /// By number; a cut leaves any of them, whole, in part or not at all, whatever the order.
    submitted: BTreeMap<u64, Submitted>,
    next_write: u64,
    /// Names as reads see them.
    names: BTreeMap<PathBuf, u64>,
    /// Names that survive a cut.
    durable_names: BTreeMap<PathBuf, u64>,
    /// Syncs begun.
    syncs: u64,
    /// The last of them that is through, of each folder.
    synced: HashMap<PathBuf, u64>,
    dirs: HashSet<PathBuf>,
    operations: u64,
    bytes_read: u64,
    /// How often all tasks were polled.
    turn: u64,
    /// How long operations take.
    pace: SimRng,
    cut_at: Option<u64>,
    fail_write: Option<u64>,
    fail_flush: Option<u64>,
    capacity: u64,
    now_ms: i64,
    timers: Vec<(i64, Waker)>,
    spawned: VecDeque<Pin<Box<dyn Future<Output = ()>>>>,
}

impl State {
    fn used(&self) -> u64 {
        self.inodes.values().map(|i| i.current.len() as u64).sum()
    }

    /// Makes the names in a folder durable that were there when a sync began.
    fn names_synced(&mut self, folder: &Path, number: u64, names: &BTreeMap<PathBuf, u64>) {
        let last = self.synced.entry(folder.to_owned()).or_default();
        if *last > number {
            return;
        }
        *last = number;
        self.durable_names.retain(|p, _| p.parent() != Some(folder));
        let in_it = names.iter().filter(|(p, _)| p.parent() == Some(folder));
        self.durable_names.extend(in_it.map(|(p, i)| (p.clone(), *i)));
    }
}

/// The simulated machine. Clones share it.
#[derive(Clone)]
pub struct SimHost(Rc<RefCell<State>>);

impl Default for SimHost {
    fn default() -> Self {
        Self::new()
    }
}

enum Gate {
    Go,
    Cut,
}

impl SimHost {
    /// An empty disk.
    #[must_use]
    pub fn new() -> Self {
        Self(Rc::new(RefCell::new(State {
            inodes: HashMap::new(),
            next_inode: 0,
            submitted: BTreeMap::new(),
            next_write: 0,
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            syncs: 0,
            synced: HashMap::new(),
            dirs: HashSet::new(),
            operations: 0,
            bytes_read: 0,
            turn: 0,
            pace: SimRng::new(0),
            cut_at: None,
            fail_write: None,
            fail_flush: None,
            capacity: u64::MAX,
            now_ms: 1_700_000_000_000,
            timers: Vec::new(),
            spawned: VecDeque::new(),
        })))
    }

    /// Arranges a fault.
    pub fn inject(&self, fault: Fault) {
        let mut s = self.0.borrow_mut();
        match fault {
            Fault::CutAfter(n) => s.cut_at = Some(s.operations + n),
            Fault::WriteError(n) => s.fail_write = Some(n),
            Fault::FlushError(n) => s.fail_flush = Some(n),
            Fault::Full(bytes) => s.capacity = bytes,
        }
    }

    /// Operations that changed the disk so far.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.0.borrow().operations
    }

    /// Bytes read from files so far.
    #[must_use]
    pub fn bytes_read(&self) -> u64 {
        self.0.borrow().bytes_read
    }

    /// Whether the cut has happened.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        let s = self.0.borrow();
        s.cut_at.is_some_and(|at| s.operations > at)
    }

    /// Bytes all files take.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.0.borrow().used()
    }

    /// An empty disk for the next process, a moment later.
    fn restarted(&self) -> Self {
        let (old, host) = (self.0.borrow(), Self::new());
        {
            let mut new = host.0.borrow_mut();
            new.now_ms = old.now_ms + 1;
            new.next_inode = old.next_inode;
            new.dirs = old.dirs.clone();
        }
        host
    }

    /// The disk as a machine finds it after the power was cut: unflushed blocks there, absent or torn.
    #[must_use]
    pub fn after_power_cut(&self, rng: &mut SimRng) -> Self {
        let (old, host) = (self.0.borrow(), self.restarted());
        {
            let mut new = host.0.borrow_mut();
            let mut names = old.durable_names.clone();
            for (path, inode) in &old.names {
                if names.get(path) != Some(inode) && rng.below(2) == 0 {
                    names.insert(path.clone(), *inode);
                }
            }
            for path in old.durable_names.keys() {
                if !old.names.contains_key(path) && rng.below(2) == 0 {
                    names.remove(path);
                }
            }
            let mut ids: Vec<u64> = names.values().copied().collect();
            ids.sort_unstable();
            ids.dedup();
            for id in ids {
                let submitted = old.submitted.values().filter(|w| w.inode == id);
                new.inodes.insert(id, old.inodes[&id].after_power_cut(submitted, rng));
            }
            new.durable_names = names.clone();
            new.names = names;
        }
        host
    }

    /// The disk as it is, with the process gone but the power on (SIGKILL).
    #[must_use]
    pub fn after_kill(&self) -> Self {
        let (old, host) = (self.0.borrow(), self.restarted());
        {
            let mut new = host.0.borrow_mut();
            new.names = old.names.clone();
            new.durable_names = old.durable_names.clone();
            new.inodes = old.inodes.clone();
            // The kernel may carry out what it was given, in any order.
            for (number, write) in old.submitted.iter().filter(|(number, _)| *number % 2 == 0) {
                if let Some(inode) = new.inodes.get_mut(&write.inode) {
                    inode.put(*number, &write.bytes, write.position);
                }
            }
            new.next_write = old.next_write;
        }
        host
    }

    /// Paths of all files.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        self.0.borrow().names.keys().cloned().collect()
    }

    /// A file's bytes.
    #[must_use]
    pub fn contents(&self, path: &Path) -> Vec<u8> {
        let s = self.0.borrow();
        s.names
            .get(path)
            .and_then(|id| s.inodes.get(id))
            .map(|i| i.current.clone())
            .unwrap_or_default()
    }

    /// Flips one bit of a file where it is durable (bit rot).
    pub fn flip_bit(&self, path: &Path, byte: u64) {
        let mut s = self.0.borrow_mut();
        let id = s.names[path];
        let inode = s.inodes.get_mut(&id).expect("named files have an inode");
        inode.current[byte as usize] ^= 1;
        if let Some(b) = inode.durable.get_mut(byte as usize) {
            *b ^= 1;
        }
    }

    /// Moves the clock.
    pub fn advance(&self, by: Duration) {
        let due: Vec<Waker> = {
            let mut s = self.0.borrow_mut();
            s.now_ms += by.as_millis() as i64;
            let now = s.now_ms;
            let (due, rest): (Vec<_>, Vec<_>) = s.timers.drain(..).partition(|(at, _)| *at <= now);
            s.timers = rest;
            due.into_iter().map(|(_, w)| w).collect()
        };
        for waker in due {
            waker.wake();
        }
    }

    /// Runs `main` and what it spawns, in turn, until `main` is done or the cut has come. `None` after a cut
    /// and where everything waits for a timer nobody advances.
    pub fn run<T>(&self, main: impl Future<Output = T>) -> Option<T> {
        let mut main = std::pin::pin!(main);
        let mut tasks: Vec<Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
        let mut cx = Context::from_waker(Waker::noop());
        let mut idle_rounds = 0;
        loop {
            let before = self.operations();
            self.0.borrow_mut().turn += 1;
            if let Poll::Ready(value) = main.as_mut().poll(&mut cx) {
                return (!self.is_cut()).then_some(value);
            }
            let mut finished = false;
            tasks.extend(self.0.borrow_mut().spawned.drain(..));
            tasks.retain_mut(|task| {
                let ready = task.as_mut().poll(&mut cx).is_ready();
                finished |= ready;
                !ready
            });
            if self.is_cut() {
                return None;
            }
            if finished || before != self.operations() || !self.0.borrow().spawned.is_empty() {
                idle_rounds = 0;
            } else {
                idle_rounds += 1;
                if idle_rounds > 64 {
                    // Nothing moves but time.
                    self.advance(Duration::from_millis(10));
                }
                if idle_rounds > 20_000 {
                    return None;
                }
            }
        }
    }

    fn gate(&self) -> Gate {
        let mut s = self.0.borrow_mut();
        s.operations += 1;
        match s.cut_at {
            Some(at) if s.operations > at => Gate::Cut,
            _ => Gate::Go,
        }
    }

    /// Some turns of the other tasks between a call and its effect, as a real disk would give them: mostly few, now and then so
    /// many that what was begun later is through first.
    async fn turns(&self) {
        let until = {
            let mut s = self.0.borrow_mut();
            let more = if s.pace.below(8) == 0 { 16 } else { 3 };
            s.turn + 1 + s.pace.below(more)
        };
        poll_fn(|_| {
            if self.0.borrow().turn >= until {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }

    /// The number of a sync that begins now, and the names that it covers.
    fn begin_sync(&self) -> (u64, BTreeMap<PathBuf, u64>) {
        let mut s = self.0.borrow_mut();
        s.syncs += 1;
        (s.syncs, s.names.clone())
    }

    async fn change(&self) {
        self.turns().await;
        if matches!(self.gate(), Gate::Cut) {
            pending::<()>().await;
        }
    }
}

/// A file of the simulated disk.
pub struct SimFile {
    host: SimHost,
    inode: u64,
    mode: OpenMode,
}

/// Plain memory.
pub struct SimBuf(Vec<u8>);

impl std::ops::Deref for SimBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl std::ops::DerefMut for SimBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(5)
}

fn enospc() -> io::Error {
    io::ErrorKind::StorageFull.into()
}

fn count_down(counter: &mut Option<u64>) -> bool {
    match counter {
        Some(0) => {
            *counter = None;
            true
        }
        Some(n) => {
            *n -= 1;
            false
        }
        None => false,
    }
}

impl HostFile for SimFile {
    type Buf = SimBuf;

    async fn write_at(&self, buf: SimBuf, position: u64) -> io::Result<()> {
        let number = self.carry_out(&buf, position).await?;
        let mut s = self.host.0.borrow_mut();
        let inode = s.inodes.get_mut(&self.inode).expect("open files have an inode");
        inode.put(number, &buf, position);
        Ok(())
    }

    /// Nothing else becomes durable by it: a device that takes O_DSYNC for a write through its cache flushes no other write.
    async fn write_durable_at(&self, buf: SimBuf, position: u64) -> io::Result<()> {
        assert_eq!(self.mode, OpenMode::Durable, "the file was opened for it");
        let number = self.carry_out(&buf, position).await?;
        let mut s = self.host.0.borrow_mut();
        if count_down(&mut s.fail_flush) {
            return Err(eio());
        }
        let inode = s.inodes.get_mut(&self.inode).expect("open files have an inode");
        inode.put(number, &buf, position);
        inode.put_durably(number, &buf, position);
        Ok(())
    }

    async fn read_behind(&self, mut memory: BytesMut, position: u64, len: usize) -> io::Result<BytesMut> {
        let into = memory.spare_capacity_mut().as_ptr() as u64;
        assert_eq!(
            (into % BLOCK, position % BLOCK, len as u64 % BLOCK),
            (0, 0, 0),
            "direct reads are aligned"
        );
        assert!(
            memory.capacity() - memory.len() >= len,
            "there is room for what is read"
        );
        self.host.turns().await;
        let mut s = self.host.0.borrow_mut();
        let bytes = &s.inodes[&self.inode].current;
        let start = (position as usize).min(bytes.len());
        let end = (start + len).min(bytes.len());
        memory.extend_from_slice(&bytes[start..end]);
        s.bytes_read += (end - start) as u64;
        Ok(memory)
    }

    async fn flush(&self) -> io::Result<()> {
        let began = self.host.0.borrow().inodes[&self.inode].clone();
        self.host.change().await;
        let mut s = self.host.0.borrow_mut();
        let failed = count_down(&mut s.fail_flush);
        let inode = s.inodes.get_mut(&self.inode).expect("open files have an inode");
        if failed {
            inode.lost();
            return Err(eio());
        }
        inode.flushed(&began);
        Ok(())
    }

    async fn make_room(&self, len: u64) -> io::Result<()> {
        self.host.change().await;
        let mut s = self.host.0.borrow_mut();
        let room = s.capacity.saturating_sub(s.used());
        let inode = s.inodes.get_mut(&self.inode).expect("open files have an inode");
        if len.saturating_sub(inode.current.len() as u64) > room {
            return Err(enospc());
        }
        // Durable at once: after a cut zeros may stand where nothing was written.
        for bytes in [&mut inode.current, &mut inode.durable] {
            bytes.resize(bytes.len().max(len as usize), 0);
        }
        Ok(())
    }

    async fn truncate(&self, len: u64) -> io::Result<()> {
        self.host.change().await;
        let mut s = self.host.0.borrow_mut();
        let inode = s.inodes.get_mut(&self.inode).expect("open files have an inode");
        inode.current.resize(len as usize, 0);
        inode.durable.truncate(len as usize);
        inode.dirty.retain(|block, _| *block < len.div_ceil(BLOCK));
        Ok(())
    }

    async fn size(&self) -> io::Result<u64> {
        Ok(self.host.0.borrow().inodes[&self.inode].current.len() as u64)
    }
}

impl SimFile {
    fn submit(&self, buf: &[u8], position: u64) -> u64 {
        let mut s = self.host.0.borrow_mut();
        s.next_write += 1;
        let number = s.next_write;
        if s.cut_at.is_none_or(|at| s.operations <= at) {
            let write = Submitted {
                inode: self.inode,
                position,
                bytes: buf.to_vec(),
            };
            s.submitted.insert(number, write);
        }
        number
    }

    /// Waits until the disk is through with a write, and says what becomes of it; its number.
    async fn carry_out(&self, buf: &[u8], position: u64) -> io::Result<u64> {
        assert_eq!(position % BLOCK, 0, "direct writes are block-aligned");
        assert_eq!(buf.len() as u64 % BLOCK, 0, "direct writes are whole blocks");
        let number = self.submit(buf, position);
        self.host.change().await;
        let mut s = self.host.0.borrow_mut();
        s.submitted.remove(&number);
        if count_down(&mut s.fail_write) {
            return Err(eio());
        }
        let end = position + buf.len() as u64;
        let grown = end.saturating_sub(s.inodes[&self.inode].current.len() as u64);
        if s.used() + grown > s.capacity {
            return Err(enospc());
        }
        Ok(number)
    }
}

impl Host for SimHost {
    type File = SimFile;

    fn buffer(&self, len: usize) -> SimBuf {
        SimBuf(vec![UNFILLED; len])
    }

    async fn aside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        work()
    }

    async fn open(&self, path: &Path, mode: OpenMode) -> io::Result<SimFile> {
        let known = self.0.borrow().names.get(path).copied();
        let inode = match (known, mode) {
            (Some(inode), _) => inode,
            (None, _) if self.0.borrow().dirs.contains(path) => return Err(io::ErrorKind::IsADirectory.into()),
            (None, OpenMode::Existing) => return Err(io::ErrorKind::NotFound.into()),
            (None, OpenMode::Create | OpenMode::Durable) => {
                self.change().await;
                let mut s = self.0.borrow_mut();
                let inode = s.next_inode;
                s.next_inode += 1;
                s.inodes.insert(inode, Inode::default());
                s.names.insert(path.to_owned(), inode);
                inode
            }
        };
        Ok(SimFile {
            host: self.clone(),
            inode,
            mode,
        })
    }

    async fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut s = self.0.borrow_mut();
        for dir in path.ancestors() {
            s.dirs.insert(dir.to_owned());
        }
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let s = self.0.borrow();
        let mut names: Vec<String> = s
            .names
            .keys()
            .chain(&s.dirs)
            .filter(|p| p.parent() == Some(path))
            .filter_map(|p| Some(p.file_name()?.to_string_lossy().into_owned()))
            .collect();
        names.sort_unstable();
        Ok(names)
    }

    async fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.change().await;
        let mut s = self.0.borrow_mut();
        s.names.remove(path).map(|_| ()).ok_or(io::ErrorKind::NotFound.into())
    }

    async fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.change().await;
        let mut s = self.0.borrow_mut();
        let holds = |p: &PathBuf| p.parent() == Some(path);
        if s.names.keys().any(holds) || s.dirs.iter().any(holds) {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        s.dirs.remove(path);
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        if matches!(self.gate(), Gate::Cut) {
            return Err(eio());
        }
        let mut s = self.0.borrow_mut();
        let moved = |p: &PathBuf| {
            let below = p.strip_prefix(from).ok()?;
            Some(if below.as_os_str().is_empty() {
                to.to_owned()
            } else {
                to.join(below)
            })
        };
        if s.dirs.contains(from) {
            s.dirs = std::mem::take(&mut s.dirs)
                .into_iter()
                .map(|p| moved(&p).unwrap_or(p))
                .collect();
        } else if !s.names.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        s.names = std::mem::take(&mut s.names)
            .into_iter()
            .map(|(p, inode)| (moved(&p).unwrap_or(p), inode))
            .collect();
        Ok(())
    }

    async fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let (number, names) = self.begin_sync();
        self.change().await;
        self.0.borrow_mut().names_synced(path, number, &names);
        Ok(())
    }

    async fn sync_all(&self) -> io::Result<()> {
        let (number, names) = self.begin_sync();
        let began = self.0.borrow().inodes.clone();
        self.change().await;
        let mut s = self.0.borrow_mut();
        let failed = count_down(&mut s.fail_flush);
        for (id, inode) in &mut s.inodes {
            match began.get(id) {
                _ if failed => inode.lost(),
                Some(began) => inode.flushed(began),
                None => {}
            }
        }
        if failed {
            return Err(eio());
        }
        let folders: HashSet<PathBuf> = (names.keys().chain(s.durable_names.keys()))
            .filter_map(|p| Some(p.parent()?.to_owned()))
            .collect();
        for folder in folders {
            s.names_synced(&folder, number, &names);
        }
        Ok(())
    }

    fn free_space(&self, _path: &Path) -> io::Result<u64> {
        let s = self.0.borrow();
        Ok(s.capacity.saturating_sub(s.used()))
    }

    fn now_ms(&self) -> i64 {
        self.0.borrow().now_ms
    }

    async fn sleep(&self, time: Duration) {
        let at = self.now_ms() + time.as_millis().max(1) as i64;
        let mut is_known = false;
        poll_fn(|cx| {
            let mut s = self.0.borrow_mut();
            if s.now_ms >= at {
                return Poll::Ready(());
            }
            // One waker for all tasks polls them anyway.
            if !std::mem::replace(&mut is_known, true) {
                s.timers.push((at, cx.waker().clone()));
            }
            Poll::Pending
        })
        .await;
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.0.borrow_mut().spawned.push_back(Box::pin(task));
    }

    async fn yield_now(&self) {
        let mut yielded = false;
        poll_fn(|_| {
            if std::mem::replace(&mut yielded, true) {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }
}
