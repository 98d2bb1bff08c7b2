//! Removal of files that are needed no more, in no one's way.
//!
//! To free the blocks of a large file keeps a file system busy for tens of milliseconds and more, and the disk too if it is told of
//! each (`discard`), and a topic may have thousands of folders: appends must not wait for that. So what goes is first renamed into a
//! folder of its own, which makes its name free at once, and removed from there by the host's helper threads, one file after
//! the other and large ones piece by piece. What a crash or a stop leaves in that folder the next start removes.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    error::StorageError,
    host::{Host, HostFile, OpenMode},
    sync::WaitList,
};

/// Bytes that a file loses at a time.
const STEP: u64 = 4 << 20;
/// The disk is others' for so long after a step.
const PAUSE: Duration = Duration::from_millis(4);

/// How often a folder is emptied before it is left to the next start.
const EMPTYINGS_MAX: usize = 5;

/// A file, or the folder of a partition.
struct Removed {
    /// Where it is now.
    path: PathBuf,
    /// The folder it was in, if that should go once it is empty.
    parent: Option<PathBuf>,
}

/// What a shard has to remove.
pub(crate) struct Removal<H: Host> {
    host: H,
    dir: PathBuf,
    /// Begins the names that this shard gives in this incarnation.
    prefix: String,
    next: Cell<u64>,
    queue: RefCell<VecDeque<Removed>>,
    changed: WaitList,
}

impl<H: Host> Removal<H> {
    /// Makes the folder `dir` of what is to be removed. The first shard takes what earlier starts have left there.
    ///
    /// # Errors
    /// Any failure of the disk.
    pub async fn open(host: H, dir: PathBuf, shard: u32, incarnation: u64) -> Result<Self, StorageError> {
        host.create_dir(&dir).await.map_err(StorageError::io("create", &dir))?;
        let mut queue = VecDeque::new();
        if shard == 0 {
            let now = format!("{incarnation}-");
            let left = host.list(&dir).map_err(StorageError::io("list", &dir))?;
            queue.extend(left.iter().filter(|n| !n.starts_with(&now)).map(|n| Removed {
                path: dir.join(n),
                parent: None,
            }));
        }
        Ok(Self {
            host,
            dir,
            prefix: format!("{incarnation}-{shard}"),
            next: Cell::new(0),
            queue: RefCell::new(queue),
            changed: WaitList::default(),
        })
    }

    /// Makes the name of a file free, and has the file removed later.
    pub fn remove_file(&self, path: &Path) {
        if let Err(error) = self.take(path, None) {
            tracing::warn!(path = %path.display(), %error, "a file that is needed no more could not be removed");
        }
    }

    /// The same for a folder with the files in it; then for the folder above it, if that is empty.
    ///
    /// # Errors
    /// What the disk says; it is still there then.
    pub fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.take(path, path.parent())
    }

    fn take(&self, path: &Path, parent: Option<&Path>) -> io::Result<()> {
        let n = self.next.replace(self.next.get() + 1);
        let to = self.dir.join(format!("{}-{n}", self.prefix));
        match self.host.rename(path, &to) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(e),
        }
        self.queue.borrow_mut().push_back(Removed {
            path: to,
            parent: parent.map(Path::to_owned),
        });
        self.changed.wake_all();
        Ok(())
    }

    /// Waits for something to remove, and removes one file, or one folder with what is in it. Nothing is removed any more once
    /// `closing` says so; [`wake`](Self::wake) makes it look.
    pub async fn remove_next(&self, closing: impl Fn() -> bool) {
        let next = self
            .changed
            .wait(|| {
                if closing() {
                    return Some(None);
                }
                self.queue.borrow_mut().pop_front().map(Some)
            })
            .await;
        let Some(next) = next else { return };
        if let Err(error) = self.remove(&next.path, &closing).await {
            tracing::warn!(path = %next.path.display(), %error, "could not be removed; the next start tries again");
        }
        if let Some(parent) = next.parent {
            // Mostly it is not empty.
            let _ = self.host.remove_dir(&parent).await;
        }
    }

    async fn remove(&self, path: &Path, closing: &impl Fn() -> bool) -> io::Result<()> {
        match self.shrink(path, closing).await {
            Err(e) if e.kind() == io::ErrorKind::IsADirectory => {}
            other => return other,
        }
        let mut attempts = EMPTYINGS_MAX;
        loop {
            for name in self.host.list(path)? {
                self.shrink(&path.join(name), closing).await?;
            }
            if closing() {
                return Ok(());
            }
            attempts -= 1;
            match self.host.remove_dir(path).await {
                // A file that was being made in it when it was renamed came after the look at it.
                Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty && attempts > 0 => {
                    self.host.sleep(PAUSE).await;
                }
                other => return other,
            }
        }
    }

    /// Removes a file, unless the shard closes meanwhile.
    async fn shrink(&self, path: &Path, closing: &impl Fn() -> bool) -> io::Result<()> {
        let file = self.host.open(path, OpenMode::Existing).await?;
        let mut left = file.size().await?;
        while left > STEP && !closing() {
            left -= STEP;
            file.truncate(left).await?;
            self.host.sleep(PAUSE).await;
        }
        drop(file);
        if closing() {
            return Ok(());
        }
        self.host.remove_file(path).await
    }

    /// Lets a waiting [`remove_next`](Self::remove_next) ask again whether the shard closes.
    pub fn wake(&self) {
        self.changed.wake_all();
    }
}
