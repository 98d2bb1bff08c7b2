//! Taking away: retention, DeleteRecords, deletion of partitions.

use std::rc::Rc;

use crate::{
    batch::{BatchHeader, RecordKind},
    error::StorageError,
    host::Host,
    log::SegmentMeta,
    retention,
    segment::{index_path, partition_dir, segment_path, topic_dir},
    shard::{Shard, commit::Completion, partition::Partition},
    types::{Offset, PartitionKey},
};

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

    pub(crate) async fn remove_segments(&self, partition: &Rc<Partition>, gone: Vec<SegmentMeta>) {
        // Batches of removed segments that are in memory only need not be written any more. Only whole segments:
        // what stays must begin on a block.
        for entry in partition.tail.borrow_mut().iter_mut_from(0) {
            entry.written |= gone.iter().any(|s| s.base == entry.batch.header.segment_base);
        }
        let logs = self.0.files.logs();
        for segment in gone {
            self.0.files.forget(partition.key, Some(segment.base));
            partition.indexes.borrow_mut().remove(&segment.base);
            partition
                .sealed_indexes
                .borrow_mut()
                .retain(|(base, _)| *base != segment.base);
            for path in [
                segment_path(logs, &partition.key, segment.base),
                index_path(logs, &partition.key, segment.base),
            ] {
                if let Err(error) = self.0.host.remove_file(&path)
                    && error.kind() != std::io::ErrorKind::NotFound
                {
                    tracing::warn!(path = %path.display(), %error, "a segment file could not be removed");
                }
            }
        }
        self.0.read_cache.forget(partition.key);
        self.check_disk_room();
    }

    /// Whether appends are refused because too little of the disk is free.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        self.0.disk_full.get()
    }

    /// Forgets a partition and removes its files. Its deletion must be durable in the metadata before.
    ///
    /// # Errors
    /// What the disk says; the next start removes what is left.
    pub fn remove_partition(&self, key: &PartitionKey) -> Result<(), StorageError> {
        if self.detach(key).is_none() {
            return Ok(());
        }
        let dir = partition_dir(self.0.files.logs(), key);
        self.0.host.remove_dir(&dir).map_err(|source| StorageError::Io {
            operation: "remove",
            path: dir,
            source,
        })?;
        // The topic's folder goes with its last partition.
        let topic = topic_dir(self.0.files.logs(), key);
        if self.0.host.list(&topic).is_ok_and(|left| left.is_empty()) {
            // Another shard may be removing it at the same time.
            let _ = self.0.host.remove_dir(&topic);
        }
        self.check_disk_room();
        Ok(())
    }
}
