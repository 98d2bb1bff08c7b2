//! Taking away: retention, DeleteRecords. How a partition leaves is in `leaving`.

use std::rc::Rc;

use crate::{
    batch::{BatchHeader, RecordKind},
    error::StorageError,
    host::Host,
    log::SegmentMeta,
    retention,
    segment::{index_path, segment_path},
    shard::{Shard, commit::Completion, partition::Partition},
    types::Offset,
};

impl<H: Host> Shard<H> {
    /// Moves the log start to `to` (not beyond the high watermark, never back), durably, and removes what lies
    /// wholly below. Returns the log start then in force.
    ///
    /// # Errors
    /// What the disk says, [`StorageError::Moving`] and [`StorageError::Left`].
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
            if partition.check_writable().is_err() {
                continue;
            }
            partition
                .state
                .borrow_mut()
                .producers
                .expire(now - self.0.config.producer_expiration_ms);
            self.count_producers(&partition);
            // What a restart has found was written before.
            partition.state.borrow_mut().wrote_by(now);
            self.tell_of_the_future(&partition, now);
            let plan = retention::plan(&partition.state.borrow(), &partition.config.get(), now);
            let Some(plan) = plan else { continue };
            if plan.roll {
                partition.state.borrow_mut().roll(now);
            }
            match self.delete_records(&partition, plan.log_start).await {
                Ok(log_start) => {
                    tracing::info!(partition = %partition.key, log_start, "retention moved the log start");
                }
                Err(StorageError::Moving | StorageError::Left) => {}
                Err(error) => tracing::error!(partition = %partition.key, %error, "retention failed"),
            }
            self.0.host.yield_now().await;
        }
    }

    /// Says once that records whose timestamps lie far ahead keep retention from deleting anything.
    fn tell_of_the_future(&self, partition: &Partition, now: i64) {
        let held = retention::held_by_the_future(&partition.state.borrow(), &partition.config.get(), now);
        let told = partition.told_of_the_future.replace(held.is_some());
        if let Some(newest) = held.filter(|_| !told) {
            tracing::warn!(
                partition = %partition.key, newest_timestamp_ms = newest,
                "a segment holds a record of the future: retention.ms deletes neither it nor what follows before that time has passed; \
                 DeleteRecords does, and message.timestamp.after.max.ms refuses such records"
            );
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

    /// Whether appends to a partition are refused because too little of the disk is free.
    #[must_use]
    pub fn lacks_room(&self, partition: &Partition) -> bool {
        let config = partition.config.get();
        match config.is_internal {
            true => self.0.disk_free.get() < self.0.config.kept_free_of(&config),
            false => self.0.disk_full.get(),
        }
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
