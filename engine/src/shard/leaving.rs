//! A partition leaves this node, and may come back.
//!
//! What its copy wrote last is still in the journal then, and the last checkpoint speaks of its files. Replay must not take either for
//! what the next copy of that partition wrote, nor believe in files that are gone. So a copy that may come back is *cleared*:
//!
//! | step | a crash after it finds |
//! |---|---|
//! | it is forgotten; from here on it puts nothing into the journal or its files | the copy as it was, with its files; or, if a checkpoint was stored since, an empty log, and records that follow nothing, which recovery leaves out |
//! | a record in the journal, behind all of its own, says that the log is empty | an empty log; recovery removes what is left of the files |
//! | its folder goes, durably | an empty log |
//! | the next copy may begin | that one |
//!
//! Until the next start all checkpoints say of it that it is empty, since that of the start may say otherwise.
//! A partition whose topic was deleted does not come back: its records are left out, and its files go when there is time.

use std::{cell::Cell, collections::BTreeSet, rc::Rc, time::Duration};

use bytes::Bytes;

use crate::{
    batch::Batch,
    error::StorageError,
    host::Host,
    journal::Entry,
    log::Cut,
    segment::{partition_dir, topic_dir},
    shard::{BREATH, Shard, commit::Completion},
    types::PartitionKey,
};

/// Folders of partitions renamed before others have their turn, each takes 10-30 us; and made durable at once.
const REMOVED_AT_ONCE: usize = 16;
/// Pause before what could not be cleared is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a clean stop waits for what is still to be cleared. The next start does not need it done.
const REST: Duration = Duration::from_secs(5);

impl<H: Host> Shard<H> {
    /// Forgets a partition and has its files removed. Its deletion must be durable in the metadata before, unless it may come back to
    /// this node: then it is cleared. Either is done in the background, some at a time: thousands may go at once.
    pub fn remove_partition(&self, key: &PartitionKey, may_come_back: bool) {
        if self.detach(key).is_none() {
            return;
        }
        if may_come_back {
            return self.clear(*key);
        }
        let mut leaving = self.0.leaving.borrow_mut();
        if leaving.is_empty() {
            let shard = self.clone();
            self.0.host.spawn(async move { shard.remove_leaving().await });
        }
        leaving.push_back(*key);
    }

    /// Has all removed that an earlier copy of a partition may have left, if there was one: to be called before a copy begins of which
    /// nothing was found, and is not the first of its partition anywhere. It may begin once [`wait_cleared`](Self::wait_cleared) says so.
    pub fn clear(&self, key: PartitionKey) {
        self.0.cleared.borrow_mut().insert(key);
        let mut clearing = self.0.clearing.borrow_mut();
        clearing.push_back(key);
        if clearing.len() == 1 {
            let shard = self.clone();
            self.0.host.spawn(async move { shard.clear_all().await });
        }
    }

    /// Whether a partition's copy must wait before it begins.
    #[must_use]
    pub fn is_clearing(&self, key: &PartitionKey) -> bool {
        self.0.clearing.borrow().contains(key)
    }

    /// Waits until a partition's copy may begin.
    ///
    /// # Errors
    /// [`StorageError::Poisoned`] if the journal has failed.
    pub async fn wait_cleared(&self, key: &PartitionKey) -> Result<(), StorageError> {
        let done = || (!self.is_clearing(key)).then_some(Ok(()));
        let failed = || self.check_healthy().err().map(Err);
        self.0.clearing_changed.wait(|| done().or_else(failed)).await
    }

    async fn clear_all(&self) {
        let mut told = false;
        loop {
            let some: Vec<PartitionKey> = (self.0.clearing.borrow().iter())
                .take(REMOVED_AT_ONCE)
                .copied()
                .collect();
            if some.is_empty() {
                return;
            }
            let result = self.clear_some(&some).await;
            if self.check_healthy().is_err() {
                return;
            }
            if let Err(error) = result {
                if !std::mem::replace(&mut told, true) {
                    tracing::error!(%error, "what an earlier copy left cannot be removed; until it is, there will be no other");
                }
                self.0.host.sleep(AGAIN).await;
                self.0.clearing.borrow_mut().rotate_left(some.len());
                continue;
            }
            self.0.clearing.borrow_mut().drain(..some.len());
            self.0.clearing_changed.wake_all();
        }
    }

    async fn clear_some(&self, some: &[PartitionKey]) -> Result<(), StorageError> {
        let cleared: Rc<Cell<usize>> = Rc::default();
        for key in some {
            self.0.journal.push(Entry {
                batch: Batch {
                    header: Cut::Restart { at: 0 }.header(*key),
                    payload: Bytes::new(),
                },
                must_flush: true,
                context: Completion::Cleared {
                    count: Rc::clone(&cleared),
                },
                permit: None,
            });
        }
        let failed = || self.check_healthy().err().map(Err);
        let durable = || (cleared.get() == some.len()).then_some(Ok(())).or_else(failed);
        self.0.clearing_changed.wait(durable).await?;
        let logs = self.0.files.logs();
        for key in some {
            self.remove_files(key)?;
            // Whoever was at work for the copy that has left may have opened and kept some of it again.
            self.forget_files(*key);
        }
        // A power cut must not bring the folders back under the next copies.
        for dir in some.iter().map(|key| topic_dir(logs, key)).collect::<BTreeSet<_>>() {
            match self.0.host.sync_dir(&dir).await {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(StorageError::io("sync", &dir)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Waits until all is cleared, at a clean stop; not for ever.
    pub(crate) async fn clear_rest(&self) {
        let done = || (self.0.clearing.borrow().is_empty() || self.check_healthy().is_err()).then_some(());
        futures_lite::future::or(self.0.clearing_changed.wait(done), self.0.host.sleep(REST)).await;
    }

    /// Has the files of all partitions removed that [`remove_partition`](Self::remove_partition) has left for later.
    pub(crate) async fn remove_leaving(&self) {
        loop {
            for _ in 0..REMOVED_AT_ONCE {
                let Some(key) = self.0.leaving.borrow_mut().pop_front() else {
                    return;
                };
                if let Err(error) = self.remove_files(&key) {
                    tracing::warn!(partition = %key, %error, "a deleted partition's files stay until the next start");
                }
            }
            self.0.host.sleep(BREATH).await;
        }
    }

    /// Has the files of a partition removed that this shard does not know, or does not know any more. No checkpoint may speak of them,
    /// or the deletion must be durable in the metadata.
    ///
    /// # Errors
    /// What the disk says; the next start removes what is left.
    pub fn remove_files(&self, key: &PartitionKey) -> Result<(), StorageError> {
        let dir = partition_dir(self.0.files.logs(), key);
        self.0
            .removal
            .remove_dir(&dir)
            .map_err(StorageError::io("remove", &dir))
    }
}
