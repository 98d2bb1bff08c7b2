//! Taking away: retention, DeleteRecords, deletion of partitions.

use std::rc::Rc;

use crate::{
    batch::{BatchHeader, RecordKind},
    error::StorageError,
    host::Host,
    log::SegmentMeta,
    retention,
    segment::{index_path, partition_dir, segment_path},
    shard::{BREATH, Shard, commit::Completion, partition::Partition},
    types::{Offset, PartitionKey},
};

/// Folders of partitions renamed before others have their turn; each takes 10-30 us.
const REMOVED_AT_ONCE: usize = 16;

impl<H: Host> Shard<H> {
    /// Moves the log start to `to` (not beyond the high watermark, never back), durably, and removes what lies
    /// wholly below. Returns the log start then in force.
    ///
    /// # Errors
    /// What the disk says.
    pub async fn delete_records(&self, partition: &Rc<Partition>, to: Offset) -> Result<Offset, StorageError> {
        partition.check_writable()?;
        let (current, can) = {
            let state = partition.state.borrow();
            (state.log_start(), state.can_start_at(to))
        };
        if to <= current || !can {
            return Ok(current);
        }
        let header = BatchHeader::marker(RecordKind::LogStart, partition.key, to);
        let context = Completion::LogStart {
            partition: Rc::clone(partition),
            to,
        };
        self.mark(partition, header, context, || {
            let log_start = partition.state.borrow().log_start();
            (log_start >= to).then_some(log_start)
        })
        .await
    }

    /// Removes what retention says, of every partition.
    pub async fn apply_retention(&self) {
        let now = self.0.host.now_ms();
        for partition in self.partitions() {
            if partition.check_writable().is_err() || partition.deleted.get() {
                continue;
            }
            partition
                .state
                .borrow_mut()
                .producers
                .expire(now - self.0.config.producer_expiration_ms);
            self.count_producers(&partition);
            let plan = retention::plan(&partition.state.borrow(), &partition.config.get(), now);
            let Some(plan) = plan else { continue };
            if plan.roll {
                partition.state.borrow_mut().roll(now);
            }
            match self.delete_records(&partition, plan.log_start).await {
                Ok(log_start) => {
                    tracing::info!(partition = %partition.key, log_start, "retention moved the log start");
                }
                Err(error) => tracing::error!(partition = %partition.key, %error, "retention failed"),
            }
            self.0.host.yield_now().await;
        }
    }

    pub(crate) fn remove_segments(&self, partition: &Rc<Partition>, gone: Vec<SegmentMeta>) {
        // Batches of removed segments that are in memory only need not be written any more. Only whole segments:
        // what stays must begin on a block.
        for entry in partition.tail.borrow_mut().iter_mut_from(0) {
            let header = &entry.batch.header;
            if !entry.written && gone.iter().any(|s| s.base == header.segment_base) {
                entry.written = true;
                partition.extents.borrow_mut().push(*header);
            }
        }
        let logs = self.0.files.logs();
        for segment in gone {
            self.0.files.forget(partition.key, Some(segment.base));
            self.0.index_cache.forget(partition.key, segment.base);
            partition
                .sealed_indexes
                .borrow_mut()
                .retain(|(base, _)| *base != segment.base);
            let removal = &self.0.removal;
            removal.remove_file(&segment_path(logs, &partition.key, segment.base));
            removal.remove_file(&index_path(logs, &partition.key, segment.base));
        }
        self.0.read_cache.forget(partition.key);
    }

    /// Whether appends are refused because too little of the disk is free.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        self.0.disk_full.get()
    }

    /// Forgets a partition and has its files removed. Its deletion must be durable in the metadata before. If it may come back to
    /// this node, its folder is out of the way when this returns; if not, soon: thousands may go with a topic.
    ///
    /// # Errors
    /// What the disk says; the next start removes what is left.
    pub fn remove_partition(&self, key: &PartitionKey, may_come_back: bool) -> Result<(), StorageError> {
        if self.detach(key).is_none() {
            return Ok(());
        }
        if may_come_back {
            return self.remove_files(key);
        }
        let mut leaving = self.0.leaving.borrow_mut();
        if leaving.is_empty() {
            let shard = self.clone();
            self.0.host.spawn(async move { shard.remove_leaving().await });
        }
        leaving.push_back(*key);
        Ok(())
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

    /// Has the files of a partition removed that this shard does not know, or does not know any more. Its deletion must be durable in the
    /// metadata before.
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

    /// Removes files in the background, one at a time.
    pub(crate) async fn removal_loop(&self) {
        let closing = || self.0.closing.get();
        while !closing() {
            self.0.removal.remove_next(closing).await;
            self.check_disk_room();
        }
    }
}
