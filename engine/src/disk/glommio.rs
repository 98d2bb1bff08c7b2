//! Direct I/O on a glommio executor.
//!
//! Buffers are the executor's DMA memory. Names are looked up and renamed by blocking system calls: they are rare (a segment
//! or a topic made or removed) and take microseconds. What takes longer is for the helper threads ([`helpers`]).

use std::{
    cell::Cell,
    future::Future,
    io,
    ops::{Deref, DerefMut},
    os::fd::{AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use ::glommio::{
    CpuSet, GlommioError, PoolPlacement, TaskQueueHandle,
    io::{Directory, DmaBuffer, DmaFile, OpenOptions},
};
use bytes::BytesMut;

use super::uring::Uring;
use crate::host::{Host, HostFile, OpenMode};

/// Linux's flag on all architectures that glommio runs on. rustix's `OFlags::DSYNC` is O_SYNC, which writes the inode's times, too.
const O_DSYNC: i32 = 0o1_0000;

/// Permissions of a file that is made, less the umask.
const CREATED_MODE: u32 = 0o666;

/// A DMA buffer; not cleared when it is handed out.
pub struct DmaBuf(DmaBuffer);

impl Deref for DmaBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl DerefMut for DmaBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.0.as_bytes_mut()
    }
}

/// A file opened with `O_DIRECT`.
pub struct GlommioFile {
    file: DmaFile,
    /// The same file with O_DSYNC: glommio has no flags for a single write, and its fdatasync goes through a worker thread that shares the
    /// shard's core (kernel-notes.md).
    durable: Option<DmaFile>,
    uring: Rc<Uring>,
}

fn flat(error: GlommioError<()>) -> io::Error {
    let kind = error.raw_os_error().map(io::Error::from_raw_os_error);
    kind.unwrap_or_else(|| io::Error::from(error))
}

async fn write(file: &DmaFile, buf: DmaBuf, position: u64) -> io::Result<()> {
    let len = buf.len();
    let written = file.write_at(buf.0, position).await.map_err(flat)?;
    // A direct write stops short only where the device has no room left.
    (written == len).then_some(()).ok_or(io::ErrorKind::StorageFull.into())
}

impl HostFile for GlommioFile {
    type Buf = DmaBuf;

    async fn write_at(&self, buf: DmaBuf, position: u64) -> io::Result<()> {
        write(&self.file, buf, position).await
    }

    async fn write_durable_at(&self, buf: DmaBuf, position: u64) -> io::Result<()> {
        let Some(file) = &self.durable else {
            unreachable!("only files opened for it are written so");
        };
        write(file, buf, position).await
    }

    async fn read_behind(&self, memory: BytesMut, position: u64, len: usize) -> io::Result<BytesMut> {
        self.uring.read(self.file.as_raw_fd(), memory, position, len).await
    }

    async fn flush(&self) -> io::Result<()> {
        self.file.fdatasync().await.map_err(flat)
    }

    async fn make_room(&self, len: u64) -> io::Result<()> {
        self.file.pre_allocate(len, false).await.map_err(flat)
    }

    async fn truncate(&self, len: u64) -> io::Result<()> {
        // glommio gives this to a helper thread, too.
        let _aside = Aside::begin().await;
        self.file.truncate(len).await.map_err(flat)
    }

    async fn size(&self) -> io::Result<u64> {
        // Not glommio's, which looks up the path that it was opened by. The system knows it without a look at the disk.
        // SAFETY: the file is open for as long as it is borrowed.
        let file = unsafe { BorrowedFd::borrow_raw(self.file.as_raw_fd()) };
        Ok(rustix::fs::fstat(file)?.st_size.max(0) as u64)
    }
}

thread_local! {
    /// Work of this thread's executor that its helper threads have not finished.
    static ASIDE: Cell<usize> = const { Cell::new(0) };
    /// The executor is about to end: its helper threads get no more work.
    static SETTLING: Cell<bool> = const { Cell::new(false) };
}

/// Work for a helper thread, from before it is handed over until its result is back.
struct Aside;

impl Aside {
    /// Never returns once the executor is about to end: who waits here is dropped with it.
    async fn begin() -> Self {
        if SETTLING.get() {
            return std::future::pending().await;
        }
        ASIDE.set(ASIDE.get() + 1);
        Self
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        ASIDE.set(ASIDE.get() - 1);
    }
}

/// Helper threads of an executor: one may be removing a large file while others wait for the other.
const HELPERS: usize = 2;

/// Where the helper threads of a shard's executor run: on any of these cores. glommio would bind them to the shard's own.
///
/// # Errors
/// What the system says if it cannot name the cores that there are.
pub fn helpers(cores: &[usize]) -> io::Result<PoolPlacement> {
    let cores = CpuSet::online().map_err(flat)?.filter(|core| cores.contains(&core.cpu));
    Ok(PoolPlacement::Fenced(HELPERS, cores))
}

/// Runs blocking work on one of the executor's helper threads.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let aside = Aside::begin().await;
    // A task of its own: the thread works on if the caller is dropped.
    let running = ::glommio::spawn_local(async move {
        let _aside = aside;
        ::glommio::executor().spawn_blocking(work).await
    });
    match running.detach().await {
        Some(result) => result,
        None => unreachable!("nobody cancels a detached task"),
    }
}

/// Waits until the executor's helper threads are idle, and lets nobody give them more work. They panic if their work ends after the
/// executor; call this last.
pub async fn settle() {
    SETTLING.set(true);
    while ASIDE.get() > 0 {
        ::glommio::timer::sleep(Duration::from_millis(1)).await;
    }
}

/// The executor this thread runs, as a [`Host`].
#[derive(Clone)]
pub struct GlommioHost {
    background: TaskQueueHandle,
    uring: Rc<Uring>,
    /// The data folder. Open from the start: the system tells those who have it open of what it could not write, and nobody who opens it
    /// when another was told.
    dir: Arc<std::fs::File>,
}

impl GlommioHost {
    /// Bytes of the file system that holds `path`.
    ///
    /// # Errors
    /// What the system says.
    pub fn total_space(&self, path: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(stat.f_blocks * stat.f_frsize)
    }

    /// Must be called inside an executor; `background` is the task queue for write-back and housekeeping, `workers` are the cores for the
    /// kernel's worker threads, and `dir` is the data folder.
    ///
    /// # Errors
    /// What the system says if a ring cannot be set up.
    pub fn new(background: TaskQueueHandle, workers: &[usize], dir: &Path) -> io::Result<Self> {
        Ok(Self {
            background,
            uring: Rc::new(Uring::new(workers)?),
            dir: Arc::new(std::fs::File::open(dir)?),
        })
    }
}

impl Host for GlommioHost {
    type File = GlommioFile;

    fn buffer(&self, len: usize) -> DmaBuf {
        DmaBuf(::glommio::allocate_dma_buffer(len))
    }

    async fn aside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        aside(work).await
    }

    async fn open(&self, path: &Path, mode: OpenMode) -> io::Result<GlommioFile> {
        let create = if mode == OpenMode::Existing { 0 } else { libc::O_CREAT };
        let opened = self.uring.open(path, libc::O_RDWR | create, CREATED_MODE).await?;
        // glommio opens a path, looks it up again for what it wants to know of the file, and panics if it is gone by then. This
        // one leads to the file, whatever becomes of its name, for as long as `opened` lives.
        let path = &PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()));
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let file = options.dma_open(path).await.map_err(flat)?;
        let durable = match mode {
            OpenMode::Existing | OpenMode::Create => None,
            OpenMode::Durable => {
                options.custom_flags(O_DSYNC);
                Some(options.dma_open(path).await.map_err(flat)?)
            }
        };
        drop(opened);
        Ok(GlommioFile {
            file,
            durable,
            uring: Rc::clone(&self.uring),
        })
    }

    async fn create_dir(&self, path: &Path) -> io::Result<()> {
        let path = path.to_owned();
        aside(move || {
            // A parent may be removed, as empty, before its new child is made.
            match std::fs::create_dir_all(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => std::fs::create_dir_all(&path),
                made => made,
            }
        })
        .await
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let entries = match std::fs::read_dir(path) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        let mut names = entries
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<io::Result<Vec<_>>>()?;
        names.sort_unstable();
        Ok(names)
    }

    async fn remove_file(&self, path: &Path) -> io::Result<()> {
        let path = path.to_owned();
        aside(move || std::fs::remove_file(path)).await
    }

    async fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let path = path.to_owned();
        aside(move || std::fs::remove_dir(path)).await
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    async fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let dir = Directory::open(path).await.map_err(flat)?;
        dir.sync().await.map_err(flat)?;
        dir.close().await.map_err(flat)
    }

    async fn sync_all(&self) -> io::Result<()> {
        let dir = Arc::clone(&self.dir);
        aside(move || rustix::fs::syncfs(&*dir)).await?;
        Ok(())
    }

    fn free_space(&self, path: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(stat.f_bavail * stat.f_frsize)
    }

    fn now_ms(&self) -> i64 {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_millis() as i64)
    }

    async fn sleep(&self, time: Duration) {
        ::glommio::timer::sleep(time).await;
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        match ::glommio::spawn_local_into(task, self.background) {
            Ok(task) => {
                task.detach();
            }
            Err(error) => unreachable!("the background queue lives as long as the executor: {error}"),
        }
    }

    async fn yield_now(&self) {
        ::glommio::executor().yield_task_queue_now().await;
    }
}
