//! What a data folder is: its cluster, its node, its own id, and the lock that keeps a second broker out.

use std::{
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use millrace_engine::layout;
use thiserror::Error;
use uuid::Uuid;

/// Version of the folder's layout; a broker refuses any other.
const LAYOUT: i64 = 1;
/// Name of the file.
pub const FILE: &str = "millrace.identity";
/// Its name until it is written.
const HALF_WRITTEN: &str = "millrace.new";
/// Name of the file whose lock says that a broker uses the folder.
const LOCK: &str = "LOCK";
/// Pause between two looks at whether the folder is still at its path.
const WATCH_PAUSE: Duration = Duration::from_secs(1);

/// Why a folder cannot be used; the text says what to do.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// The system refused.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another broker runs on it.
    #[error("{path} is in use by a broker; stop it, or give another folder with --data-dir", path = path.display())]
    Locked {
        /// The folder.
        path: PathBuf,
    },
    /// Not readable as an identity.
    #[error("{path} is damaged: {reason}", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Written by another version.
    #[error("{path}: the data folder has layout {found}, this build uses {LAYOUT}; use the release that wrote it", path = path.display())]
    Layout {
        /// The file.
        path: PathBuf,
        /// As written.
        found: i64,
    },
    /// Started under another node id than before.
    #[error("the data folder belongs to node {stored}, but --node-id {given} was given; a folder keeps its node id")]
    NodeId {
        /// In the folder.
        stored: i64,
        /// Asked for.
        given: i64,
    },
    /// Of another cluster.
    #[error(
        "the data folder belongs to cluster {stored}, but the other nodes are cluster {found}; a folder keeps its cluster"
    )]
    Cluster {
        /// In the folder.
        stored: String,
        /// What the quorum says.
        found: String,
    },
    /// No folder of ours.
    #[error("{path} is no Millrace data folder", path = path.display())]
    NoFolder {
        /// The folder.
        path: PathBuf,
    },
    /// Holds a broker's data, but not what says whose.
    #[error("{path} is missing, though its folder holds a broker's data: put it back from a copy of the folder, or give another folder with --data-dir", path = path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// Holds files, but none of ours.
    #[error("{path} is not empty and not a Millrace data folder; give an empty or new one with --data-dir", path = path.display())]
    Foreign {
        /// The folder.
        path: PathBuf,
    },
}

/// A data folder, locked for as long as this lives.
#[derive(Debug)]
pub struct Identity {
    /// Kafka's cluster id.
    pub cluster_id: String,
    /// The folder has not been in a cluster yet: the id is only a proposal.
    pub is_new: bool,
    /// How many folders the node had in this cluster before this one, as the cluster counts them.
    pub generation: u32,
    dir: PathBuf,
    /// The node.
    pub node_id: i32,
    /// The folder's own id.
    pub directory_id: Uuid,
    lock: File,
    undo_is_due: Arc<AtomicBool>,
    is_over: Arc<AtomicBool>,
}

/// 22 characters, as Kafka writes ids: url-safe base64 without padding.
fn kafka_uuid(id: Uuid) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let bits = id.as_u128();
    (0..22)
        .map(|i| {
            let shift = 122 - i * 6;
            let index = if shift >= 0 { bits >> shift } else { bits << -shift };
            ALPHABET[(index & 63) as usize] as char
        })
        .collect()
}

/// Makes a folder and those above it where they are missing, and their names durable. Returns those it made, the folder itself first.
fn make_durably(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let named = dir.ancestors().filter(|d| !d.as_os_str().is_empty());
    let missing: Vec<&Path> = named.take_while(|d| !d.exists()).collect();
    fs::create_dir_all(dir)?;
    for made in &missing {
        let above = made.parent().filter(|d| !d.as_os_str().is_empty());
        File::open(above.unwrap_or(Path::new(".")))?.sync_all()?;
    }
    Ok(missing.into_iter().map(Path::to_owned).collect())
}

/// Whether a folder without an identity has nothing else either that matters.
fn check_empty(dir: &Path) -> Result<(), IdentityError> {
    if layout::checkpoint_dir(dir).exists() || layout::journal_dir(dir).exists() {
        return Err(IdentityError::Missing { path: dir.join(FILE) });
    }
    let is_ours = |name: &str| matches!(name, LOCK | HALF_WRITTEN | "lost+found");
    let mut names = fs::read_dir(dir).map_err(|source| IdentityError::Io {
        path: dir.to_owned(),
        source,
    })?;
    match names.all(|entry| entry.is_ok_and(|e| e.file_name().to_str().is_some_and(is_ours))) {
        true => Ok(()),
        false => Err(IdentityError::Foreign { path: dir.to_owned() }),
    }
}

/// Leaves a folder as it was found, empty or not there at all, when it is dropped before the folder has joined a cluster: a start that
/// failed, or was stopped before that, has claimed nothing then.
#[derive(Debug)]
pub struct Undo {
    dir: PathBuf,
    /// Folders that were not there.
    made: Vec<PathBuf>,
    /// The folder was empty, and has joined no cluster since.
    is_due: Arc<AtomicBool>,
    /// What watches the folder need not any more.
    is_over: Arc<AtomicBool>,
    /// Nobody else uses it meanwhile.
    _lock: File,
}

impl Drop for Undo {
    fn drop(&mut self) {
        if !self.is_due.load(Ordering::Acquire) {
            return;
        }
        self.is_over.store(true, Ordering::Release);
        // What cannot be removed is in nobody's way: the next start takes it.
        for folder in layout::folders(&self.dir) {
            _ = fs::remove_dir_all(folder);
        }
        for name in [FILE, HALF_WRITTEN, LOCK] {
            _ = fs::remove_file(self.dir.join(name));
        }
        for folder in &self.made {
            _ = fs::remove_dir(folder);
        }
    }
}

/// Opens a data folder, making and naming it the first time. `node_id` is what was asked for, if anything was.
///
/// # Errors
/// [`IdentityError`].
pub fn open(dir: &Path, node_id: Option<i32>) -> Result<(Identity, Undo), IdentityError> {
    let io_error = |path: &Path| {
        let path = path.to_owned();
        move |source| IdentityError::Io { path, source }
    };
    let made = make_durably(dir).map_err(io_error(dir))?;
    let path = dir.join(FILE);
    if !path.exists() {
        check_empty(dir)?;
    }
    let lock = take_lock(dir)?;
    let is_new = !path.exists();
    if is_new {
        // Another broker may have been quicker.
        check_empty(dir)?;
    }
    let undo = Undo {
        dir: dir.to_owned(),
        made,
        is_due: Arc::new(AtomicBool::new(is_new)),
        is_over: Arc::default(),
        _lock: lock.try_clone().map_err(io_error(dir))?,
    };
    if is_new {
        let text = text(
            &kafka_uuid(Uuid::new_v4()),
            None,
            i64::from(node_id.unwrap_or(0)),
            Uuid::new_v4(),
        );
        write_durably(dir, &path, &text).map_err(io_error(&path))?;
    }
    let text = fs::read_to_string(&path).map_err(io_error(&path))?;
    let damaged = |reason: &str| IdentityError::Damaged {
        path: path.clone(),
        reason: reason.into(),
    };
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| damaged(e.message()))?;
    let number = |name: &str| {
        table
            .get(name)
            .and_then(toml::Value::as_integer)
            .ok_or_else(|| damaged(&format!("{name} is missing")))
    };
    let string = |name: &str| {
        table
            .get(name)
            .and_then(toml::Value::as_str)
            .ok_or_else(|| damaged(&format!("{name} is missing")))
    };
    let found = number("layout")?;
    if found != LAYOUT {
        return Err(IdentityError::Layout { path, found });
    }
    let stored = number("node_id")?;
    if let Some(given) = node_id.map(i64::from).filter(|given| *given != stored) {
        return Err(IdentityError::NodeId { stored, given });
    }
    let identity = Identity {
        cluster_id: string("cluster_id")?.to_owned(),
        is_new: !table.contains_key("generation"),
        generation: match table.get("generation") {
            Some(number) => (number.as_integer().and_then(|n| u32::try_from(n).ok()))
                .ok_or_else(|| damaged("generation is out of range"))?,
            None => 0,
        },
        dir: dir.to_owned(),
        undo_is_due: Arc::clone(&undo.is_due),
        is_over: Arc::clone(&undo.is_over),
        node_id: i32::try_from(stored).map_err(|_| damaged("node_id is out of range"))?,
        directory_id: string("directory_id")?
            .parse()
            .map_err(|_| damaged("directory_id is no UUID"))?,
        lock,
    };
    Ok((identity, undo))
}

/// Without a generation the folder belongs to no cluster yet.
fn text(cluster_id: &str, generation: Option<u32>, node_id: i64, directory_id: Uuid) -> String {
    let generation = generation.map_or(String::new(), |g| format!("generation = {g}\n"));
    format!(
        "# Written by Millrace. Do not edit.\nlayout = {LAYOUT}\ncluster_id = \"{cluster_id}\"\n{generation}node_id = {node_id}\n\
         directory_id = \"{directory_id}\"\n"
    )
}

impl Identity {
    /// Notes durably which cluster the folder belongs to from now on, and its generation there.
    ///
    /// # Errors
    /// The system's.
    pub fn join(&mut self, cluster_id: &str, generation: u32) -> Result<(), IdentityError> {
        let path = self.dir.join(FILE);
        let text = text(cluster_id, Some(generation), i64::from(self.node_id), self.directory_id);
        write_durably(&self.dir, &path, &text).map_err(|source| IdentityError::Io { path, source })?;
        self.cluster_id = cluster_id.to_owned();
        self.generation = generation;
        self.is_new = false;
        self.undo_is_due.store(false, Ordering::Release);
        Ok(())
    }

    /// Watches, in a thread of its own, whether the folder is still at its path, and ends the process if it is not: writes and
    /// flushes of files that were removed succeed, but the next start would find nothing of what they acknowledged.
    ///
    /// # Errors
    /// The system's.
    pub fn watch(&self) -> io::Result<()> {
        let (dir, path) = (self.dir.clone(), self.dir.join(LOCK));
        let own = file_id(&self.lock.metadata()?);
        let is_over = Arc::clone(&self.is_over);
        thread::Builder::new().name("folder-watch".into()).spawn(move || {
            while is_at(&path, own) {
                thread::sleep(WATCH_PAUSE);
            }
            if is_over.load(Ordering::Acquire) {
                return;
            }
            // Not by the log, which other threads write: nothing more may be acknowledged.
            _ = writeln!(
                io::stderr(),
                "millrace: the data folder {} was removed or replaced under the running broker, which ends now; put the folder back, or \
                 start with an empty one",
                dir.display()
            );
            process::exit(1);
        })?;
        Ok(())
    }

    /// Fails unless the folder belongs to this cluster.
    ///
    /// # Errors
    /// [`IdentityError::Cluster`].
    pub fn check_cluster(&self, cluster_id: &str) -> Result<(), IdentityError> {
        if self.cluster_id == cluster_id {
            return Ok(());
        }
        Err(IdentityError::Cluster {
            stored: self.cluster_id.clone(),
            found: cluster_id.to_owned(),
        })
    }
}

/// Device and inode.
fn file_id(of: &Metadata) -> (u64, u64) {
    (of.dev(), of.ino())
}

/// Whether the path still leads to the file. What keeps the system from saying so is no proof that it does not.
fn is_at(path: &Path, id: (u64, u64)) -> bool {
    match fs::symlink_metadata(path) {
        Ok(found) => file_id(&found) == id,
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// Locks a folder that is a data folder already, without reading more of it: its broker must not run.
///
/// # Errors
/// [`IdentityError`].
pub fn lock(dir: &Path) -> Result<File, IdentityError> {
    let path = dir.join(FILE);
    if !path.exists() {
        return Err(IdentityError::NoFolder { path: dir.to_owned() });
    }
    take_lock(dir)
}

fn take_lock(dir: &Path) -> Result<File, IdentityError> {
    let path = dir.join(LOCK);
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|source| IdentityError::Io { path, source })?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(_) => Err(IdentityError::Locked { path: dir.to_owned() }),
    }
}

fn write_durably(dir: &Path, path: &Path, text: &str) -> io::Result<()> {
    let temporary = dir.join(HALF_WRITTEN);
    let mut file = File::create(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What it makes stays.
    fn open_for_good(dir: &Path, node_id: Option<i32>) -> Result<Identity, IdentityError> {
        let (identity, undo) = open(dir, node_id)?;
        undo.is_due.store(false, Ordering::Release);
        Ok(identity)
    }

    #[test]
    fn a_start_that_joins_no_cluster_leaves_nothing() {
        let above = tempfile::tempdir().expect("temporary folder");
        let dir = above.path().join("new/data");
        let start = |joins: bool| {
            let (mut identity, undo) = open(&dir, Some(3)).expect("new");
            fs::create_dir(layout::journal_dir(&dir)).expect("made");
            if joins {
                identity.join("c", 0).expect("written");
            }
            assert!(matches!(open(&dir, None), Err(IdentityError::Locked { .. })));
            drop((identity, undo));
        };
        start(false);
        assert!(!above.path().join("new").exists());
        fs::create_dir_all(&dir).expect("made");
        start(false);
        assert_eq!(fs::read_dir(&dir).expect("there").count(), 0, "it was there, and empty");
        start(true);
        assert!(dir.join(FILE).exists() && layout::journal_dir(&dir).exists());
        drop(open(&dir, Some(3)).expect("the same"));
        assert!(dir.join(FILE).exists(), "it was not empty");
    }

    #[test]
    fn a_folder_keeps_its_identity_and_takes_one_broker_at_a_time() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let first = open_for_good(dir.path(), Some(3)).expect("new");
        assert_eq!(first.cluster_id.len(), 22);
        assert!(matches!(
            open_for_good(dir.path(), None),
            Err(IdentityError::Locked { .. })
        ));
        drop(first);
        assert!(matches!(
            open_for_good(dir.path(), Some(4)),
            Err(IdentityError::NodeId { stored: 3, given: 4 })
        ));
        let mut again = open_for_good(dir.path(), None).expect("the same");
        assert!(again.is_new && again.check_cluster("other").is_err());
        again.join("other", 7).expect("written");
        drop(again);
        let again = open_for_good(dir.path(), None).expect("the same");
        assert_eq!(
            (again.is_new, again.generation, again.cluster_id.as_str()),
            (false, 7, "other")
        );
        assert_eq!(again.node_id, 3);
    }

    #[test]
    fn folders_of_others_are_refused() {
        let dir = tempfile::tempdir().expect("temporary folder");
        fs::write(dir.path().join("notes.txt"), "x").expect("written");
        assert!(matches!(open(dir.path(), None), Err(IdentityError::Foreign { .. })));
        let dir = tempfile::tempdir().expect("temporary folder");
        fs::create_dir(dir.path().join("journal")).expect("made");
        assert!(matches!(open(dir.path(), None), Err(IdentityError::Missing { .. })));
        let dir = tempfile::tempdir().expect("temporary folder");
        fs::write(dir.path().join(HALF_WRITTEN), "lay").expect("written");
        assert!(
            open(dir.path(), None).is_ok(),
            "a first start that was killed is no stranger"
        );
        let dir = tempfile::tempdir().expect("temporary folder");
        fs::write(dir.path().join(FILE), "layout = 99\n").expect("written");
        assert!(matches!(
            open(dir.path(), None),
            Err(IdentityError::Layout { found: 99, .. })
        ));
    }
}
