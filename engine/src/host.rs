//! The seam to the outside: files, time and tasks of one shard's thread.
//!
//! The engine is generic over [`Host`], so the code that serves traffic is the code that the simulation cuts at
//! every write. Implementations decide nothing: they carry out one operation and report.

use std::{
    future::Future,
    io,
    ops::{Deref, DerefMut},
    path::Path,
    rc::Rc,
    time::Duration,
};

use bytes::BytesMut;

use crate::{layout::BLOCK, types::align_up};

/// An open file. Writes and reads are direct: positions and lengths are multiples of
/// [`BLOCK`](crate::layout::BLOCK).
pub trait HostFile: 'static {
    /// Memory that the device can write from.
    type Buf: Deref<Target = [u8]> + DerefMut;

    /// Writes all of `buf` at `position`.
    fn write_at(&self, buf: Self::Buf, position: u64) -> impl Future<Output = io::Result<()>>;
    /// Writes all of `buf` at `position` and waits until it is durable. Only for blocks written before, in a file opened as
    /// [`OpenMode::Durable`]: then one write does what write and flush would do in two operations.
    fn write_durable_at(&self, buf: Self::Buf, position: u64) -> impl Future<Output = io::Result<()>>;
    /// Reads up to `len` bytes behind what `memory` holds; fewer only at the end of the file. It is memory that [`aligned`] gave, with
    /// room for them, and holds whole blocks.
    fn read_behind(&self, memory: BytesMut, position: u64, len: usize) -> impl Future<Output = io::Result<BytesMut>>;
    /// Reads up to `len` bytes; fewer only at the end of the file.
    fn read_at(&self, position: u64, len: usize) -> impl Future<Output = io::Result<BytesMut>> {
        async move {
            // A file that something cut short has any length.
            let whole = align_up(len as u64, BLOCK) as usize;
            let mut read = self.read_behind(aligned(whole), position, whole).await?;
            read.truncate(len);
            Ok(read)
        }
    }
    /// Makes every completed write durable (data and what is needed to read it back).
    fn flush(&self) -> impl Future<Output = io::Result<()>>;
    /// Makes the file at least `len` bytes long, with room on the disk for all of it; what was never written reads as zeros. An aid:
    /// a write that needs no room and does not lengthen its file is one that the kernel need not hand to a worker
    /// (kernel-notes.md).
    fn make_room(&self, len: u64) -> impl Future<Output = io::Result<()>>;
    /// Cuts or extends the file.
    fn truncate(&self, len: u64) -> impl Future<Output = io::Result<()>>;
    /// Length in bytes.
    fn size(&self) -> impl Future<Output = io::Result<u64>>;
}

/// Empty memory that begins where a block may, for a device to read into, with room for `len` bytes.
#[must_use]
pub fn aligned(len: usize) -> BytesMut {
    let mut memory = BytesMut::with_capacity(len + BLOCK as usize);
    let skipped = memory.as_ptr().align_offset(BLOCK as usize);
    memory.resize(skipped, 0);
    memory.split_off(skipped)
}

/// How a file is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenMode {
    /// Must exist.
    Existing,
    /// Made if it is not there; never cut.
    Create,
    /// The same, for durable writes beside others.
    Durable,
}

/// Files, clock and tasks of a shard.
pub trait Host: Clone + 'static {
    /// An open file of this host.
    type File: HostFile;

    /// A buffer of `len` bytes, a multiple of the block. What is in it is of no meaning, and must not reach a disk: whoever fills it
    /// fills all of it (to clear it first cost 2–3 % of the CPU at saturation).
    fn buffer(&self, len: usize) -> <Self::File as HostFile>::Buf;
    /// Has another thread do work that takes long and waits for nothing.
    fn aside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> impl Future<Output = T>;
    /// Opens a file; a folder is [`io::ErrorKind::IsADirectory`].
    fn open(&self, path: &Path, mode: OpenMode) -> impl Future<Output = io::Result<Self::File>>;
    /// Makes a folder and its parents, without stopping this thread for it.
    fn create_dir(&self, path: &Path) -> impl Future<Output = io::Result<()>>;
    /// Names in a folder, sorted; empty if the folder is not there.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;
    /// Removes a file, without stopping this thread for it: it may take long.
    fn remove_file(&self, path: &Path) -> impl Future<Output = io::Result<()>>;
    /// Removes an empty folder, in the same way.
    fn remove_dir(&self, path: &Path) -> impl Future<Output = io::Result<()>>;
    /// Renames a file, or a folder with all it holds.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Makes creations, removals and renames in a folder durable.
    fn sync_dir(&self, path: &Path) -> impl Future<Output = io::Result<()>>;
    /// Makes everything in the file system that holds the data folder durable: every completed write, creation, removal and
    /// rename. One wait instead of several for each file; it also waits for what other programs wrote there. Fails if anything could
    /// not be written since the last time, whoever was told.
    fn sync_all(&self) -> impl Future<Output = io::Result<()>>;
    /// Bytes that files under `path` can still take.
    fn free_space(&self, path: &Path) -> io::Result<u64>;
    /// Wall clock, ms since 1970.
    fn now_ms(&self) -> i64;
    /// Waits.
    fn sleep(&self, time: Duration) -> impl Future<Output = ()>;
    /// Runs a task on this thread beside the foreground work, at lower priority.
    fn spawn(&self, task: impl Future<Output = ()> + 'static);
    /// Lets other tasks run if they are due.
    fn yield_now(&self) -> impl Future<Output = ()>;
}

/// A file shared by the tasks of a shard.
pub type SharedFile<H> = Rc<<H as Host>::File>;
