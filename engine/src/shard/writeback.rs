//! From memory to segments: what frees the journal's ring and lets memory go.
//!
//! A pass writes every partition that has batches only in the journal, flushes each segment touched, stores a
//! checkpoint, and only then lets the ring use the files behind it again.

use std::rc::Rc;

use crate::{
    batch::Batch,
    checkpoint::{self, Checkpoint, Name, PartitionCheckpoint},
    error::StorageError,
    host::Host,
    index::SegmentIndex,
    journal::Entry,
    segment::index_path,
    shard::{Shard, commit::Completion, partition::Partition},
};

impl<H: Host> Shard<H> {
    /// Asks for a pass; it runs in the background.
    pub(crate) fn want_write_back(&self) {
        if !self.0.writeback_wanted.replace(true) {
            self.0.writeback_signal.wake_all();
        }
    }

    pub(crate) async fn write_back_loop(&self) {
        let inner = &self.0;
        loop {
            inner
                .writeback_signal
                .wait(|| (inner.writeback_wanted.get() || inner.closing.get()).then_some(()))
                .await;
            if inner.closing.get() || inner.poisoned.borrow().is_some() {
                return;
            }
            let result = self.write_back().await;
            inner.writeback_wanted.set(false);
            if let Err(error) = result {
                if error.is_disk_full() {
                    inner.disk_full.set(true);
                    inner.disk_room.set(0);
                    tracing::error!(shard = inner.config.shard, %error, "write-back waits for room on the disk");
                } else {
                    tracing::error!(shard = inner.config.shard, %error, "write-back failed and will be tried again");
                }
                inner.host.sleep(std::time::Duration::from_secs(1)).await;
                self.check_disk_room();
                inner.writeback_wanted.set(true);
            }
        }
    }

    /// Everything appended before the call is in segments, with a checkpoint, when it returns.
    ///
    /// # Errors
    /// Any failure of the disk.
    pub async fn flush_all(&self) -> Result<(), StorageError> {
        let inner = &self.0;
        if let Some(stage) = inner.poisoned.borrow().clone() {
            return Err(StorageError::Poisoned { stage });
        }
        self.write_back().await
    }

    async fn write_back(&self) -> Result<(), StorageError> {
        let inner = &self.0;
        inner
            .writeback_done
            .wait(|| (!inner.writeback_running.replace(true)).then_some(()))
            .await;
        let result = self.write_back_pass().await;
        inner.writeback_running.set(false);
        inner.writeback_done.wake_all();
        result
    }

    async fn write_back_pass(&self) -> Result<(), StorageError> {
        let inner = &self.0;
        inner.counters.writebacks.set(inner.counters.writebacks.get() + 1);
        // Relaxed appends are durable before the checkpoint says anything about them.
        inner.journal.flush().await.inspect_err(|e| self.poison_shard(e))?;
        let tail = inner.journal.head();
        let dirty = std::mem::take(&mut *inner.dirty.borrow_mut());
        let mut failed = None;
        for (done, partition) in dirty.iter().enumerate() {
            partition.dirty.set(false);
            if partition.deleted.get() {
                continue;
            }
            match self.write_partition(partition).await {
                Ok(()) => {}
                Err(error) if error.is_disk_full() => {
                    for p in &dirty[done..] {
                        if !p.dirty.replace(true) {
                            inner.dirty.borrow_mut().push(Rc::clone(p));
                        }
                    }
                    failed = Some(error);
                    break;
                }
                Err(error) => {
                    if partition.check_healthy().is_ok() {
                        tracing::error!(partition = %partition.key, %error, "the partition is offline: its segment cannot be written; what is acknowledged stays in the journal");
                        partition.poison(&error.to_string());
                    }
                    self.carry_forward(partition);
                }
            }
            inner.host.yield_now().await;
        }
        if let Some(error) = failed {
            return Err(error);
        }
        self.store_checkpoint(tail).await?;
        inner.journal.release(tail);
        self.check_disk_room();
        self.trim_tail();
        Ok(())
    }

    async fn write_partition(&self, partition: &Rc<Partition>) -> Result<(), StorageError> {
        // Later appends begin in a block of their own, so that no block is written twice.
        let end = {
            let mut state = partition.state.borrow_mut();
            state.close_block();
            state.log_end()
        };
        partition.wait_high_watermark(end).await?;
        let batches: Vec<Batch> = partition
            .tail
            .borrow()
            .iter()
            .filter(|e| !e.written && e.batch.header.base_offset < end)
            .map(|e| e.batch.clone())
            .collect();
        self.write_to_segments(partition, &batches).await?;
        self.mark_written(partition, &batches);
        self.store_sealed_indexes(partition).await;
        Ok(())
    }

    /// Puts a failed partition's batches into the journal again, so that its ring can go on.
    fn carry_forward(&self, partition: &Rc<Partition>) {
        let batches: Vec<Batch> = partition
            .tail
            .borrow()
            .iter()
            .filter(|e| !e.written && e.batch.header.last_offset < partition.state.borrow().high_watermark())
            .map(|e| e.batch.clone())
            .collect();
        for batch in batches {
            self.0.journal.push(Entry {
                batch,
                must_flush: true,
                context: Completion::Carried,
                permit: None,
            });
        }
        if !partition.dirty.replace(true) {
            self.0.dirty.borrow_mut().push(Rc::clone(partition));
        }
    }

    /// Index files are an aid: if one cannot be written it is made anew when it is needed.
    async fn store_sealed_indexes(&self, partition: &Partition) {
        let sealed = std::mem::take(&mut *partition.sealed_indexes.borrow_mut());
        for (base, index) in sealed {
            self.store_index(partition, base, &index).await;
            partition.indexes.borrow_mut().insert(base, Rc::new(index));
        }
    }

    async fn store_index(&self, partition: &Partition, base: i64, index: &SegmentIndex) {
        if index.complete_from > crate::layout::BLOCK {
            return;
        }
        let path = index_path(self.0.files.logs(), &partition.key, base);
        if let Err(error) = index.store(&self.0.host, &path, partition.key, base).await {
            tracing::warn!(%error, "an index could not be stored and will be made anew when needed");
        }
    }

    /// Called at a clean stop: the next start finds the index of the active segment too.
    pub(crate) async fn store_active_indexes(&self) {
        for partition in self.partitions() {
            let active = partition.active_index.borrow().clone();
            if let Some((base, index)) = active {
                self.store_index(&partition, base, &index).await;
            }
        }
    }

    async fn store_checkpoint(&self, tail: crate::journal::Position) -> Result<(), StorageError> {
        let inner = &self.0;
        let mut captured = Vec::new();
        let mut waits = Vec::new();
        for partition in self.partitions() {
            let written_end = partition.written_end();
            captured.push(PartitionCheckpoint::capture(&partition.state.borrow(), written_end));
            if partition.entries_begun != partition.entries_done {
                let begun = partition.entries_begun.get();
                waits.push((partition, begun));
            }
        }
        // The captured state may know of appends that are still on their way; it must not become durable before them.
        for (partition, begun) in waits {
            partition
                .changed
                .wait(|| (partition.entries_done.get() >= begun || partition.check_healthy().is_err() || partition.deleted.get()).then_some(()))
                .await;
            if partition.deleted.get() || partition.check_healthy().is_err() {
                captured.retain(|c| c.key() != partition.key);
                captured.extend(self.capture_durable(&partition));
            }
        }
        if let Some(stage) = inner.poisoned.borrow().clone() {
            return Err(StorageError::Poisoned { stage });
        }
        checkpoint::store(
            &inner.host,
            &inner.config.checkpoint_dir(),
            Name::Shard {
                incarnation: inner.config.incarnation,
                shard: inner.config.shard,
            },
            &Checkpoint::new(tail, 0, captured),
        )
        .await
    }

    /// A poisoned partition's state as of what is durable: sequence numbers beyond it are forgotten.
    fn capture_durable(&self, partition: &Partition) -> Option<PartitionCheckpoint> {
        if partition.deleted.get() {
            return None;
        }
        let mut state = partition.state.borrow().clone();
        state.producers.forget_from(state.high_watermark());
        state.epochs.trim_end(state.high_watermark().max(1));
        let written_end = partition.written_end().min(state.high_watermark());
        Some(PartitionCheckpoint::capture(&state, written_end))
    }
}
