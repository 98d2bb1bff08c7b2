//! Write and flush as one operation: RWF_DSYNC, through a small ring of our own on the shard's thread.
//!
//! glommio has no per-write flags, and its fdatasync goes through an io-wq worker that shares the shard's core
//! (kernel-notes.md). The ring's completions signal an eventfd, which glommio reads like any file, so that the executor
//! sleeps and wakes as usual.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    os::fd::{AsRawFd, FromRawFd, IntoRawFd, RawFd},
};

use ::glommio::io::{BufferedFile, DmaBuffer};
use io_uring::{IoUring, opcode, types};

use crate::sync::WaitList;

const RWF_DSYNC: i32 = 2;
/// Operations of the ring; the journal has few in flight.
const ENTRIES: u32 = 8;

/// The ring of one shard.
pub struct DurableWrites {
    ring: RefCell<IoUring>,
    signal: BufferedFile,
    next_id: Cell<u64>,
    /// Memory that the kernel may still read.
    in_flight: RefCell<HashMap<u64, DmaBuffer>>,
    finished: RefCell<HashMap<u64, i32>>,
    /// Somebody reads the signal, which wakes one.
    reads: Cell<bool>,
    reaped: WaitList,
}

/// Whoever reads the signal; others take over when it is dropped.
struct Reader<'a>(&'a DurableWrites);

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.0.reads.set(false);
        self.0.reaped.wake_all();
    }
}

impl DurableWrites {
    /// Must be called on an executor's thread.
    ///
    /// # Errors
    /// What the system says.
    pub fn new() -> io::Result<Self> {
        let ring = IoUring::new(ENTRIES)?;
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
            reads: Cell::new(false),
            reaped: WaitList::default(),
        })
    }

    /// Writes `buffer` at `position` of an open file and waits until it is durable. The kernel has it once this was polled.
    ///
    /// # Errors
    /// The write's error.
    pub async fn write(&self, file: RawFd, buffer: DmaBuffer, position: u64) -> io::Result<()> {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        let len = buffer.len();
        let entry = opcode::Write::new(types::Fd(file), buffer.as_ptr(), len as u32)
            .offset(position)
            .rw_flags(RWF_DSYNC)
            .build()
            .user_data(id);
        // Kept until the completion is seen, even if whoever waits gives up.
        self.in_flight.borrow_mut().insert(id, buffer);
        {
            let mut ring = self.ring.borrow_mut();
            // SAFETY: the buffer lives in `in_flight` until its completion; the kernel holds the file itself.
            unsafe { ring.submission().push(&entry) }.map_err(|e| io::Error::other(e.to_string()))?;
            ring.submit()?;
        }
        loop {
            self.reap();
            if let Some(result) = self.finished.borrow_mut().remove(&id) {
                return match usize::try_from(result) {
                    Ok(written) if written == len => Ok(()),
                    // A direct write stops short only where the device has no room left.
                    Ok(_) => Err(io::ErrorKind::StorageFull.into()),
                    Err(_) => Err(io::Error::from_raw_os_error(-result)),
                };
            }
            if self.reads.replace(true) {
                let mine = || self.finished.borrow().contains_key(&id) || !self.reads.get();
                self.reaped.wait(|| mine().then_some(())).await;
                continue;
            }
            let reader = Reader(self);
            self.signal.read_at(0, 8).await.map_err(io::Error::from)?;
            drop(reader);
        }
    }

    fn reap(&self) {
        let mut ring = self.ring.borrow_mut();
        for done in ring.completion() {
            self.in_flight.borrow_mut().remove(&done.user_data());
            self.finished.borrow_mut().insert(done.user_data(), done.result());
        }
    }
}

impl Drop for DurableWrites {
    fn drop(&mut self) {
        // The kernel may still read from them; the process is ending.
        self.in_flight
            .borrow_mut()
            .drain()
            .for_each(|(_, buffer)| std::mem::forget(buffer));
    }
}
