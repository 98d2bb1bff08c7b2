//! From memory to segments: what frees the journal's ring and lets memory go.
//!
//! A pass writes every partition that has batches only in the journal, flushes each segment touched, stores a
//! checkpoint, and only then lets the ring use the files behind it again.

use std::{cell::Cell, rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;

use crate::{
    batch::{Batch, BatchHeader, RecordKind},
    checkpoint::{self, Captured, Name},
    error::StorageError,
    host::Host,
    journal::Entry,
    log::LogState,
    segment::segment_path,
    shard::{
        Shard,
        commit::{Carried, Completion},
        partition::Partition,
    },
    sync::concurrently,
    types::Offset,
};

/// Pause after a pass that failed, or carried batches forward.
const RETRY: Duration = Duration::from_secs(1);
/// How long batches carried forward may wait for room in the ring.
const CARRY_TIMEOUT: Duration = Duration::from_secs(10);
/// Partitions written side by side while appends go on: every one may have a flush in the disk's queue, and the journal's
/// own waits behind them.
const PARTITIONS_AT_ONCE: usize = 2;
/// The same where one [`Host::sync_all`] flushes them later: their writes alone are in the disk's queue.
const PARTITIONS_AT_ONCE_UNFLUSHED: usize = 8;
/// Partitions made durable by one [`Host::sync_all`]: the file system's own writes for them go out at once, and the journal's next
/// write queues behind them.
const SYNC_ALL_MAX: usize = 64;
/// The same when nothing else is left to do, or appends wait for room in the journal.
const PARTITIONS_AT_ONCE_HURRIED: usize = 16;

/// What a pass wrote of one partition.
struct Written {
    batches: Vec<Batch>,
    /// Everything below is in segments.
    end: Offset,
    /// The state as of then.
    captured: Captured,
    /// How many of the marks are in it.
    marks: usize,
}

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
            let hurried = inner.journal.is_tight();
            let result = self.write_back(hurried).await;
            // What was appended meanwhile may have filled the ring; then nothing will come that would ask again.
            let again = inner.journal.wants_write_back(inner.dirty.borrow().len());
            inner.writeback_wanted.set(again);
            if let Err(error) = result {
                if error.is_disk_full() {
                    inner.disk_full.set(true);
                    inner.disk_free.set(0);
                    tracing::error!(shard = inner.config.shard, %error, "write-back waits for room on the disk");
                } else {
                    tracing::error!(shard = inner.config.shard, %error, "write-back failed and will be tried again");
                }
                inner.host.sleep(RETRY).await;
                self.check_disk_room();
                inner.writeback_wanted.set(true);
            } else if inner.carries.get() {
                // What failed partitions have may alone be enough to ask for the next pass, and for one after that.
                inner.host.sleep(RETRY).await;
            }
        }
    }

    /// Everything appended before the call is in segments, with a checkpoint, when it returns.
    ///
    /// # Errors
    /// Any failure of the disk.
    pub async fn flush_all(&self) -> Result<(), StorageError> {
        self.check_healthy()?;
        self.write_back(true).await
    }

    async fn write_back(&self, hurried: bool) -> Result<(), StorageError> {
        self.between_passes(self.write_back_pass(hurried)).await
    }

    async fn between_passes(&self, work: impl Future<Output = Result<(), StorageError>>) -> Result<(), StorageError> {
        let inner = &self.0;
        inner
            .writeback_done
            .wait(|| (!inner.writeback_running.replace(true)).then_some(()))
            .await;
        let result = work.await;
        inner.writeback_running.set(false);
        inner.writeback_done.wake_all();
        result
    }

    /// Stores the last pass's checkpoint again, with the partitions that are here now.
    pub(crate) async fn checkpoint_again(&self) -> Result<(), StorageError> {
        self.between_passes(async { self.store_checkpoint(self.0.checkpointed.get()).await })
            .await
    }

    async fn write_back_pass(&self, hurried: bool) -> Result<(), StorageError> {
        let inner = &self.0;
        self.check_healthy()?;
        inner.counters.writebacks.set(inner.counters.writebacks.get() + 1);
        // Nothing here waits for the journal: it may be waiting for this pass.
        let tail = inner.journal.written();
        let dirty = std::mem::take(&mut *inner.dirty.borrow_mut());
        let carried = Rc::new(Carried::default());
        let mut failed = None;
        for some in dirty.chunks(SYNC_ALL_MAX) {
            failed = self.write_partitions(some, hurried, &carried).await.or(failed);
        }
        if let Some(error) = failed {
            return Err(error);
        }
        inner.carries.set(carried.left.get() > 0);
        self.wait_carried(&carried).await?;
        self.store_checkpoint(tail).await?;
        inner.journal.release(tail);
        self.check_disk_room();
        self.trim_tail();
        self.store_indexes(&dirty).await;
        Ok(())
    }

    /// Writes partitions and makes them durable; what cannot be written is set aside in `carried`. Returns the error if it was
    /// for lack of room, or of descriptors.
    async fn write_partitions(
        &self,
        some: &[Rc<Partition>],
        hurried: bool,
        carried: &Rc<Carried>,
    ) -> Option<StorageError> {
        let sync_all = some.len() >= self.0.config.sync_all_min;
        // One partition's files are flushed while another's are written: many small ones would otherwise take a
        // flush each, one after the other.
        let results = concurrently(
            match (hurried, sync_all) {
                (true, _) => PARTITIONS_AT_ONCE_HURRIED,
                (false, true) => PARTITIONS_AT_ONCE_UNFLUSHED,
                (false, false) => PARTITIONS_AT_ONCE,
            },
            some.iter().map(|partition| async move {
                partition.dirty.set(false);
                if partition.deleted.get() {
                    return Ok(None);
                }
                let result = self.write_partition(partition, sync_all).await;
                self.0.host.yield_now().await;
                result.map(Some)
            }),
        )
        .await;
        let synced = if sync_all {
            self.0.host.sync_all().await.map_err(|e| e.to_string())
        } else {
            Ok(())
        };
        let mut failed = None;
        for (partition, result) in some.iter().zip(results) {
            let result = match (&synced, result) {
                (Err(reason), Ok(Some(_))) => Err(StorageError::Poisoned {
                    stage: format!("its segment could not be flushed: {reason}"),
                }),
                (_, result) => result,
            };
            match result {
                Ok(Some(done)) => self.finish_partition(partition, done),
                Ok(None) => {}
                Err(_) if partition.deleted.get() => {}
                Err(error) if error.is_disk_full() || error.is_not_opened() => {
                    self.mark_dirty(partition);
                    failed = Some(error);
                }
                Err(error) => {
                    if partition.check_healthy().is_ok() {
                        tracing::error!(partition = %partition.key, %error, "the partition is offline: its segment cannot be written; what is acknowledged stays in the journal");
                        partition.poison(&error.to_string());
                    }
                    if self.settled(partition).await {
                        self.carry_forward(partition, carried);
                    } else if !partition.deleted.get() {
                        carried.left.set(carried.left.get() + 1);
                    }
                }
            }
        }
        failed
    }

    /// Writes what a partition has in memory; it counts as written once it is flushed and [`finish_partition`]
    /// (Self::finish_partition) was called.
    async fn write_partition(&self, partition: &Rc<Partition>, flush_later: bool) -> Result<Written, StorageError> {
        partition.check_healthy()?;
        // Later appends begin in a block of their own, so that no block is written twice.
        let (end, captured, marks) = {
            let mut state = partition.state.borrow_mut();
            state.close_block();
            (state.log_end(), Captured::of(&state), partition.marks.borrow().len())
        };
        partition
            .changed
            .wait(|| (!partition.is_writing_below(end)).then_some(()))
            .await;
        partition.check_healthy()?;
        // Batches that the journal has not seen yet go too: being durable early does no harm.
        let batches: Vec<Batch> = {
            let tail = partition.tail.borrow();
            let from = tail.partition_point(|e| e.batch.header.base_offset < partition.unwritten_from.get());
            tail.iter_from(from)
                .take_while(|e| e.batch.header.base_offset < end)
                .filter(|e| !e.written)
                .map(|e| e.batch.clone())
                .collect()
        };
        self.write_to_segments(partition, &batches, Some(&self.0.pace), flush_later)
            .await?;
        Ok(Written {
            batches,
            end,
            captured,
            marks,
        })
    }

    fn finish_partition(&self, partition: &Rc<Partition>, written: Written) {
        self.mark_written(partition, &written.batches);
        partition.unwritten_from.set(written.end);
        *partition.in_segments.borrow_mut() = Arc::new(written.captured);
        partition.marks.borrow_mut().drain(..written.marks);
        partition.extents.borrow_mut().retain(|e| e.base_offset >= written.end);
    }

    /// Waits until the journal is through with all that a failed partition had on its way, so that it is said again with the rest; not
    /// for long. Returns whether it is.
    async fn settled(&self, partition: &Rc<Partition>) -> bool {
        let done = Rc::new(Cell::new(false));
        self.0.journal.push(Entry {
            batch: Batch {
                header: BatchHeader::marker(RecordKind::LogStart, partition.key, partition.status().log_start),
                payload: Bytes::new(),
            },
            must_flush: true,
            context: Completion::Settled {
                partition: Rc::clone(partition),
                done: Rc::clone(&done),
            },
            permit: None,
        });
        let through = partition.changed.wait(|| {
            // It has left, or its journal is through with nothing any more.
            let never = partition.deleted.get() || self.check_healthy().is_err();
            (done.get() || never).then_some(!never)
        });
        let late = async {
            self.0.host.sleep(CARRY_TIMEOUT).await;
            false
        };
        futures_lite::future::or(through, late).await
    }

    /// Says again in the journal what a failed partition's checkpoint does not say, as far as it is durable, so that the ring can go on.
    fn carry_forward(&self, partition: &Rc<Partition>, carried: &Rc<Carried>) {
        let durable_end = partition.state.borrow().durable_end();
        let tail = partition.tail.borrow();
        let without_payload = |header: &BatchHeader| Batch {
            header: *header,
            payload: Bytes::new(),
        };
        let extent = |header: &BatchHeader| {
            let kind = RecordKind::Extent;
            without_payload(&BatchHeader { kind, ..*header })
        };
        let unwritten = tail.iter_from(0).filter(|e| !e.written).map(|e| e.batch.clone());
        let (extents, marks) = (partition.extents.borrow(), partition.marks.borrow());
        let mut appended: Vec<Batch> = (unwritten.chain(extents.iter().map(extent)))
            .filter(|b| b.header.last_offset < durable_end)
            .collect();
        appended.sort_by_key(|b| b.header.base_offset);
        let batches: Vec<Batch> = marks.iter().map(without_payload).chain(appended).collect();
        drop((tail, extents, marks));
        for batch in batches {
            carried.left.set(carried.left.get() + 1);
            self.0.journal.push(Entry {
                batch,
                must_flush: true,
                context: Completion::Carried {
                    left: Rc::clone(carried),
                },
                permit: None,
            });
        }
        self.mark_dirty(partition);
    }

    /// What is carried forward is in the journal before its old place is given up. If the ring has no room left
    /// for that, the shard stops rather than forget.
    async fn wait_carried(&self, carried: &Carried) -> Result<(), StorageError> {
        if carried.left.get() == 0 {
            return Ok(());
        }
        self.check_healthy()?;
        let in_time = futures_lite::future::or(
            async { carried.changed.wait(|| (carried.left.get() == 0).then_some(true)).await },
            async {
                self.0.host.sleep(CARRY_TIMEOUT).await;
                false
            },
        )
        .await;
        if in_time {
            return Ok(());
        }
        let error = StorageError::Poisoned {
            stage: "the journal has no room to carry a failed partition's batches forward".into(),
        };
        self.poison_shard(&error);
        Err(error)
    }

    /// Called at a clean stop: nobody finds room in a file that was made for what never came.
    pub(crate) async fn shorten_active_segments(&self) {
        for partition in self.partitions() {
            let active = partition.state.borrow().segments().last().copied();
            if let Some(segment) = active
                && let Some(file) = self.0.files.opened(partition.key, segment.base)
                && file.has_room_beyond(segment.end)
            {
                let path = segment_path(self.0.files.logs(), &partition.key, segment.base);
                self.give_back_room(&file, &path, segment.end).await;
            }
        }
    }

    async fn store_checkpoint(&self, tail: crate::journal::Position) -> Result<(), StorageError> {
        let inner = &self.0;
        // Its journal failed, and with it passes that were to write what this checkpoint would give up.
        self.check_healthy()?;
        let mut partitions: Vec<_> = (self.partitions().iter())
            .map(|p| Arc::clone(&p.in_segments.borrow()))
            .collect();
        {
            let (here, cleared) = (inner.partitions.borrow(), inner.cleared.borrow());
            let left = cleared.iter().filter(|key| !here.contains_key(key));
            partitions.extend(left.map(|key| Arc::new(Captured::of(&LogState::new(*key)))));
        }
        checkpoint::store(
            &inner.host,
            &inner.config.checkpoint_dir(),
            Name::Shard {
                incarnation: inner.config.incarnation,
                shard: inner.config.shard,
            },
            tail,
            0,
            partitions,
        )
        .await?;
        inner.checkpointed.set(tail);
        Ok(())
    }
}
