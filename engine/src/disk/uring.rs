//! Reads into memory that is kept, through a small io_uring of our own on the shard's thread.
//!
//! What glommio reads stands in memory that it wants back, from where it had to be copied (kernel-notes.md). The ring's completions
//! signal an eventfd, which glommio reads like any file, so that the executor sleeps and wakes as usual.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    os::fd::{AsRawFd, FromRawFd, IntoRawFd, RawFd},
    rc::Rc,
};

use ::glommio::io::BufferedFile;
use bytes::BytesMut;
use io_uring::{IoUring, opcode, squeue, types};

use crate::sync::{Budget, Permit, WaitList};

/// Reads in flight, and the ring's entries; more wait.
const READS_MAX: u32 = 64;

struct InFlight {
    /// Memory that the kernel uses.
    memory: BytesMut,
    /// Somebody waits for it.
    wanted: bool,
    _turn: Permit,
}

/// The ring of one shard.
pub struct Uring {
    ring: RefCell<IoUring>,
    signal: BufferedFile,
    next_id: Cell<u64>,
    in_flight: RefCell<HashMap<u64, InFlight>>,
    finished: RefCell<HashMap<u64, (i32, BytesMut)>>,
    reads: Rc<Budget>,
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

/// A read that the kernel has. Its memory stays until the kernel is through with it, even if whoever waits gives up.
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
    async fn end(self) -> io::Result<(usize, BytesMut)> {
        let ring = self.ring;
        loop {
            ring.reap();
            let ended = ring.finished.borrow_mut().remove(&self.id);
            if let Some((result, memory)) = ended {
                let done = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))?;
                return Ok((done, memory));
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
        let ring = IoUring::new(READS_MAX)?;
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
            reads: Budget::new(READS_MAX.into()),
            signal_is_read: Cell::new(false),
            reaped: WaitList::default(),
        })
    }

    /// Gives the kernel a read into this memory.
    fn begin(&self, entry: &squeue::Entry, memory: BytesMut, turn: Permit) -> io::Result<Operation<'_>> {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        let entry = entry.clone().user_data(id);
        let in_flight = InFlight {
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
            let turn = self.reads.acquire(1).await;
            let room = memory.spare_capacity_mut();
            assert!(room.len() >= len, "the caller made room for what it reads");
            let asked = u32::try_from(len).unwrap_or(1 << 30);
            let entry = opcode::Read::new(types::Fd(file), room.as_mut_ptr().cast(), asked)
                .offset(position)
                .build();
            let read;
            (read, memory) = self.begin(&entry, memory, turn)?.end().await?;
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
            let ended = self.in_flight.borrow_mut().remove(&done.user_data());
            if let Some(ended) = ended.filter(|e| e.wanted) {
                (self.finished.borrow_mut()).insert(done.user_data(), (done.result(), ended.memory));
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
