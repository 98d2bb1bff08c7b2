//! A partition goes to another shard of the same node.
//!
//! | step | source | destination | on the disk after it |
//! |---|---|---|---|
//! | [`hold`](Shard::hold) | the log changes no more | | |
//! | [`settle`](Shard::settle) | all of it in segments; replay begins behind its records | | source's checkpoint: the log as it is |
//! | [`adopt`](Shard::adopt) | | takes the log, still held | both checkpoints: the same log |
//! | [`let_go`](Shard::let_go) | knows it no more | | destination's checkpoint alone |
//! | [`resume`](Shard::resume) | | appends | destination's journal |
//!
//! So whenever a crash comes, what recovery finds of the partition in several checkpoints is the same in all, and no journal has
//! records of it that replay would read but that of the shard it belongs to.
//! Up to `settle` a move can be given up ([`resume`](Shard::resume) on the source). After a failure further on nobody knows which
//! checkpoints are on the disk: the log must not change before the next start, and is offline ([`fail_move`](Shard::fail_move)).

use std::{cell::Cell, rc::Rc};

use crate::{
    batch::{BatchHeader, RecordKind},
    error::StorageError,
    host::Host,
    log::{LogConfig, LogState},
    shard::{
        BREATH, Shard,
        commit::Completion,
        partition::{Partition, TAIL_OVERHEAD},
    },
    types::PartitionKey,
};

/// Bytes of memory given back before others have their turn: the kernel takes 80 us for a MiB.
const FREED_AT_ONCE: usize = 1 << 20;

impl<H: Host> Shard<H> {
    /// From here on the log takes nothing and loses nothing; what was taken in before is still acknowledged.
    ///
    /// # Errors
    /// [`StorageError::Poisoned`]; [`StorageError::Moving`] if it is held already.
    pub fn hold(&self, partition: &Partition) -> Result<(), StorageError> {
        partition.check_writable()?;
        partition.moving.set(true);
        Ok(())
    }

    /// The log of this shard changes again; one whose move has failed stays as it is.
    pub fn resume(&self, partition: &Partition) {
        if partition.check_healthy().is_ok() {
            partition.moving.set(false);
        }
        partition.changed.wake_all();
    }

    /// Brings all of a held partition to its segments, and the start of replay behind its records; returns the log.
    ///
    /// # Errors
    /// Any failure of the disk, and [`StorageError::Moving`] if the partition was deleted meanwhile.
    pub async fn settle(&self, partition: &Rc<Partition>) -> Result<LogState, StorageError> {
        // Records of one partition are completed in order: this one, which says nothing new, comes behind all others.
        let done = Rc::new(Cell::new(false));
        let header = BatchHeader::marker(RecordKind::LogStart, partition.key, partition.status().log_start);
        let context = Completion::Settled {
            partition: Rc::clone(partition),
            done: Rc::clone(&done),
        };
        self.mark(partition, header, context, || done.get().then_some(()))
            .await?;
        self.mark_dirty(partition);
        self.flush_all().await?;
        partition.check_healthy()?;
        let state = partition.state.borrow().clone();
        if partition.deleted.get() || partition.unwritten_from.get() != state.log_end() {
            return Err(StorageError::Moving);
        }
        Ok(state)
    }

    /// Takes over the log that another shard has settled; it is held until [`resume`](Self::resume).
    ///
    /// # Errors
    /// Any failure of the disk; the partition is not here then.
    pub async fn adopt(&self, state: LogState, config: LogConfig) -> Result<(), StorageError> {
        let key = state.key;
        let partition = Partition::new(state, config);
        partition.moving.set(true);
        // Readers that were under way when it last left may have opened and kept some of it again.
        self.forget_files(key);
        self.count_producers(&partition);
        self.0.partitions.borrow_mut().insert(key, Rc::new(partition));
        let stored = self.checkpoint_again().await;
        if stored.is_err() {
            self.detach(&key);
        }
        stored
    }

    /// Forgets a partition that another shard has adopted.
    ///
    /// # Errors
    /// Any failure of the disk; the partition is not here any more, but the next start may think so.
    pub async fn let_go(&self, key: &PartitionKey) -> Result<(), StorageError> {
        self.detach(key);
        // It is not empty now, and the other shard's checkpoint says so.
        self.0.cleared.borrow_mut().remove(key);
        self.checkpoint_again().await
    }

    /// A move has failed half-way: the log is offline until the next start.
    pub fn fail_move(&self, partition: &Partition, reason: &str) {
        tracing::error!(partition = %partition.key, error = reason, "the partition is offline: its move to another core failed half-way; nothing is lost, restart the broker after the disk is mended");
        partition.poison(&format!("its move to another core: {reason}"));
    }

    /// Closes the files of a partition, and forgets what was read of them.
    pub(super) fn forget_files(&self, key: PartitionKey) {
        self.0.files.forget(key, None);
        self.0.read_cache.forget(key);
        self.0.index_cache.forget_all(key);
    }

    /// Removes a partition from memory; its files stay.
    pub(super) fn detach(&self, key: &PartitionKey) -> Option<Rc<Partition>> {
        let partition = self.0.partitions.borrow_mut().remove(key)?;
        partition.deleted.set(true);
        partition.changed.wake_all();
        self.forget_files(*key);
        let counted = partition.producers.take();
        self.0.producers.set(self.0.producers.get() - counted);
        let mut tail = partition.tail.take();
        let shard = self.clone();
        self.0.host.spawn(async move {
            let mut freed = 0;
            while let Some(entry) = tail.pop_front() {
                let size = entry.batch.payload.len() + TAIL_OVERHEAD;
                shard.0.tail_bytes.set(shard.0.tail_bytes.get().saturating_sub(size));
                drop(entry);
                freed += size;
                if freed >= FREED_AT_ONCE {
                    freed = 0;
                    shard.0.host.sleep(BREATH).await;
                }
            }
        });
        Some(partition)
    }
}
