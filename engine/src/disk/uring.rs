//! Reads into memory that is kept, and files opened by their names once, through a small io_uring of our own on the shard's thread.
//!
//! What glommio reads stands in memory that it wants back, from where it had to be copied (kernel-notes.md), and what it opens it looks
//! up by name several times. The ring's completions signal an eventfd, which glommio reads like any file, so that the executor sleeps
//! and wakes as usual.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    os::{
        fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    rc::Rc,
};

use ::glommio::io::BufferedFile;
use bytes::BytesMut;
use io_uring::{IoUring, opcode, squeue, types};

use crate::sync::{Budget, Permit, WaitList};

/// Operations in flight, and the ring's entries; more wait.
const OPERATIONS_MAX: u32 = 64;

/// What an operation does, as far as its end differs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    /// Its result is a descriptor.
    Open,
}

struct InFlight {
    kind: Kind,
    /// Memory that the kernel uses: where it reads to, or the path that it opens.
    memory: BytesMut,
    /// Somebody waits for it.
    wanted: bool,
    _turn: Permit,
}

/// What an operation gives.
enum Done {
    Read(usize),
    Opened(OwnedFd),
}

/// The ring of one shard.
pub struct Uring {
    ring: RefCell<IoUring>,
    signal: BufferedFile,
    next_id: Cell<u64>,
    in_flight: RefCell<HashMap<u64, InFlight>>,
    /// A descriptor that nobody takes any more is closed with its entry.
    finished: RefCell<HashMap<u64, (io::Result<Done>, BytesMut)>>,
    turns: Rc<Budget>,
    /// Somebody reads the signal, which wakes one.
    signal_is_read: Cell<bool>,
    reaped: WaitList,
}

/// Whoever reads the signal; others take over when it is dropped.
struct Reader<'a>(&'a Uring);

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.0.signal_is_read.set(false);
        self.0.reaped.wake_all();
    }
}

/// An operation that the kernel has. Its memory stays until the kernel is through with it, even if whoever waits gives up.
struct Operation<'a> {
    ring: &'a Uring,
    id: u64,
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        if let Some(in_flight) = self.ring.in_flight.borrow_mut().get_mut(&self.id) {
            in_flight.wanted = false;
        }
        self.ring.finished.borrow_mut().remove(&self.id);
    }
}

impl Operation<'_> {
    /// Waits for its end: what the kernel says, and the memory.
    async fn end(self) -> io::Result<(Done, BytesMut)> {
        let ring = self.ring;
        loop {
            ring.reap();
            let ended = ring.finished.borrow_mut().remove(&self.id);
            if let Some((done, memory)) = ended {
                return Ok((done?, memory));
            }
            if ring.signal_is_read.replace(true) {
                let mine = || ring.finished.borrow().contains_key(&self.id) || !ring.signal_is_read.get();
                ring.reaped.wait(|| mine().then_some(())).await;
                continue;
            }
            let reader = Reader(ring);
            ring.signal.read_at(0, 8).await.map_err(io::Error::from)?;
            drop(reader);
        }
    }
}

/// Lets the kernel's worker threads of this thread run on these cores. They belong to the thread, not to a ring, so glommio's rings
/// have the same; and are bound to the shard's own core otherwise, where one that makes a file can keep the shard waiting for as long as
/// the file system takes (kernel-notes.md). Linux 5.14 or newer.
fn place_workers(ring: &IoUring, cores: &[usize]) -> io::Result<()> {
    // SAFETY: a set of cores is a plain array of bits; one of zeros is empty.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for core in cores {
        // SAFETY: cores beyond the set's end are left out by it.
        unsafe { libc::CPU_SET(*core, &mut set) };
    }
    ring.submitter().register_iowq_aff(&set)
}

impl Uring {
    /// Must be called on an executor's thread, whose rings' kernel workers run on `workers` from then on.
    ///
    /// # Errors
    /// What the system says.
    pub fn new(workers: &[usize]) -> io::Result<Self> {
        let ring = IoUring::new(OPERATIONS_MAX)?;
        if let Err(error) = place_workers(&ring, workers) {
            tracing::debug!(%error, "the kernel's workers share the shards' cores");
        }
        // Blocking, or io_uring would report EAGAIN instead of waiting.
        let signal = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
        ring.submitter().register_eventfd(signal.as_raw_fd())?;
        Ok(Self {
            ring: RefCell::new(ring),
            // SAFETY: nobody else owns the descriptor: `into_raw_fd` gave it up. glommio reads an eventfd as it reads
            // any file, by a read operation that completes when there is something to read.
            signal: unsafe { BufferedFile::from_raw_fd(signal.into_raw_fd()) },
            next_id: Cell::new(0),
            in_flight: RefCell::default(),
            finished: RefCell::default(),
            turns: Budget::new(OPERATIONS_MAX.into()),
            signal_is_read: Cell::new(false),
            reaped: WaitList::default(),
        })
    }

    /// Gives the kernel an operation on this memory.
    fn begin(&self, kind: Kind, entry: &squeue::Entry, memory: BytesMut, turn: Permit) -> io::Result<Operation<'_>> {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        let entry = entry.clone().user_data(id);
        let in_flight = InFlight {
            kind,
            memory,
            wanted: true,
            _turn: turn,
        };
        self.in_flight.borrow_mut().insert(id, in_flight);
        let operation = Operation { ring: self, id };
        let mut ring = self.ring.borrow_mut();
        // SAFETY: the memory lives in `in_flight` until its completion; the kernel holds the file itself.
        unsafe { ring.submission().push(&entry) }.map_err(|e| io::Error::other(e.to_string()))?;
        ring.submit()?;
        Ok(operation)
    }

    /// Opens a file, with `O_CLOEXEC` beside these flags; one that is made has this mode, less the umask.
    ///
    /// # Errors
    /// What the system says.
    pub async fn open(&self, path: &Path, flags: i32, mode: u32) -> io::Result<OwnedFd> {
        let turn = self.turns.acquire(1).await;
        let name = path.as_os_str().as_bytes();
        if name.contains(&0) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut memory = BytesMut::with_capacity(name.len() + 1);
        memory.extend_from_slice(name);
        memory.extend_from_slice(&[0]);
        let entry = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), memory.as_ptr().cast())
            .flags(flags | libc::O_CLOEXEC)
            .mode(mode)
            .build();
        match self.begin(Kind::Open, &entry, memory, turn)?.end().await? {
            (Done::Opened(file), _) => Ok(file),
            (Done::Read(_), _) => unreachable!("its kind says what it gives"),
        }
    }

    /// Reads up to `len` bytes at `position` of an open file behind what `memory` holds; fewer only at the file's end.
    ///
    /// # Errors
    /// The read's error.
    pub async fn read(
        &self,
        file: RawFd,
        mut memory: BytesMut,
        mut position: u64,
        mut len: usize,
    ) -> io::Result<BytesMut> {
        while len > 0 {
            let turn = self.turns.acquire(1).await;
            let room = memory.spare_capacity_mut();
            assert!(room.len() >= len, "the caller made room for what it reads");
            let asked = u32::try_from(len).unwrap_or(1 << 30);
            let entry = opcode::Read::new(types::Fd(file), room.as_mut_ptr().cast(), asked)
                .offset(position)
                .build();
            let done;
            (done, memory) = self.begin(Kind::Read, &entry, memory, turn)?.end().await?;
            let Done::Read(read) = done else {
                unreachable!("its kind says what it gives");
            };
            // SAFETY: the kernel has written so many bytes behind the first `len()`, where the caller made room.
            unsafe { memory.set_len(memory.len() + read.min(len)) };
            position += read as u64;
            len -= read.min(len);
            // Short reads within a file end where a page or an extent does.
            if read == 0 || !position.is_multiple_of(crate::layout::BLOCK) {
                break;
            }
        }
        Ok(memory)
    }

    fn reap(&self) {
        let mut ring = self.ring.borrow_mut();
        for done in ring.completion() {
            let Some(ended) = self.in_flight.borrow_mut().remove(&done.user_data()) else {
                continue;
            };
            let result = match (usize::try_from(done.result()), ended.kind) {
                (Err(_), _) => Err(io::Error::from_raw_os_error(-done.result())),
                (Ok(read), Kind::Read) => Ok(Done::Read(read)),
                // SAFETY: the kernel has just made this descriptor, for nobody but us.
                (Ok(_), Kind::Open) => Ok(Done::Opened(unsafe { OwnedFd::from_raw_fd(done.result()) })),
            };
            if ended.wanted {
                (self.finished.borrow_mut()).insert(done.user_data(), (result, ended.memory));
            }
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel may still use it; the process is ending.
        self.in_flight
            .borrow_mut()
            .drain()
            .for_each(|(_, in_flight)| std::mem::forget(in_flight.memory));
    }
}
