//! Taking batches in: offsets and places at once, then the journal, or the segment directly for large ones.

// A length or count that is stored or sent must not wrap.
#![cfg_attr(not(test), warn(clippy::cast_possible_truncation))]

use std::{path::Path, rc::Rc, time::Duration};

use bytes::Bytes;

use crate::{
    arena::PLACED_MAX,
    batch::{Batch, BatchHeader, PayloadFormat, RecordKind},
    error::{AppendError, StorageError},
    host::{Host, HostFile},
    journal::Entry,
    kafka_batch::BatchInfo,
    layout::BLOCK,
    log::SequenceCheck,
    segment::{self, Missing, Pace, SegmentFile, segment_path},
    shard::{
        Shard,
        commit::Completion,
        partition::{Gated, Partition, TAIL_OVERHEAD, TailEntry},
        read::segment_at,
    },
    sync::Permit,
    types::{LeaderEpoch, Offset, PartitionKey, align_up},
};

/// At most one part in so many of the free disk is made room ahead in one segment.
const ROOM_SHARE: u64 = 64;
/// Pause before a file is opened again for which there was no descriptor.
const NOT_OPENED: Duration = Duration::from_millis(500);
/// Bytes of large batches of one partition written between two flushes.
const DIRECT_GROUP_BYTES: u64 = 4 << 20;

/// What an append was given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Appended {
    /// First offset.
    pub base_offset: Offset,
    /// Offset behind the last record; the append is acknowledged when the high watermark is there.
    pub end_offset: Offset,
    /// First offset of the log.
    pub log_start: Offset,
    /// The batches were there already (an idempotent producer's retry).
    pub duplicate: bool,
}

impl<H: Host> Shard<H> {
    /// Appends checked Kafka batches to a partition: all or none, at once, in the order of the calls. They
    /// are durable when [`Partition::wait_high_watermark`] of the returned end says so.
    ///
    /// # Errors
    /// [`AppendError`]; nothing is appended then.
    pub fn append(
        &self,
        key: PartitionKey,
        epoch: LeaderEpoch,
        batches: Vec<(BatchInfo, Bytes)>,
        permit: Permit,
    ) -> Result<Appended, AppendError> {
        let headers = batches
            .into_iter()
            .map(|(info, payload)| {
                let mut header = BatchHeader::for_kafka(key, &info, &payload);
                header.leader_epoch = epoch;
                Batch { header, payload }
            })
            .collect();
        self.append_batches(key, headers, permit)
    }

    /// Appends a record of the metadata log.
    ///
    /// # Errors
    /// [`AppendError`]; nothing is appended then.
    pub fn append_metadata(
        &self,
        key: PartitionKey,
        epoch: LeaderEpoch,
        payload: Bytes,
        permit: Permit,
    ) -> Result<Appended, AppendError> {
        let now = self.0.host.now_ms();
        let header = BatchHeader {
            kind: RecordKind::Batch,
            format: PayloadFormat::Metadata,
            key,
            base_offset: 0,
            last_offset: 0,
            leader_epoch: epoch,
            record_count: 1,
            attributes: 0,
            base_timestamp: now,
            max_timestamp: now,
            producer_id: -1,
            producer_epoch: -1,
            base_sequence: -1,
            payload_len: u32::try_from(payload.len()).expect("a metadata change is bounded"),
            payload_crc: crc32c::crc32c(&payload),
            segment_base: 0,
            segment_position: 0,
        };
        self.append_batches(key, vec![Batch { header, payload }], permit)
    }

    fn append_batches(&self, key: PartitionKey, batches: Vec<Batch>, permit: Permit) -> Result<Appended, AppendError> {
        let partition = self.partition(&key).ok_or(AppendError::UnknownPartition(key))?;
        let free = self.check_appendable(&partition, &batches)?;
        if let Some(duplicate) = check_sequences(&partition, &batches)? {
            return Ok(duplicate);
        }
        self.0.disk_free.set(free);
        Ok(self.take_in(&partition, batches, permit))
    }

    /// What is free on the disk after these batches, if they may be appended.
    pub(crate) fn check_appendable(&self, partition: &Partition, batches: &[Batch]) -> Result<u64, AppendError> {
        let inner = &self.0;
        partition.check_writable()?;
        if self.is_clearing(&partition.key) {
            return Err(StorageError::Moving.into());
        }
        if let Some(stage) = inner.poisoned.borrow().clone() {
            return Err(StorageError::Poisoned { stage }.into());
        }
        let bytes: u64 = batches.iter().map(|b| b.header.stored_len()).sum();
        // What nodes agree on is small, and is what the space kept free is for: without it this one could not even be told to go.
        if batches.iter().all(|b| b.header.format == PayloadFormat::Metadata) {
            return Ok(inner.disk_free.get().saturating_sub(bytes));
        }
        let kept = inner.config.kept_free_of(&partition.config.get());
        let free = inner.disk_free.get().checked_sub(bytes).filter(|free| *free >= kept);
        free.filter(|_| !self.lacks_room(partition))
            .ok_or_else(|| AppendError::DiskFull {
                reason: format!("fewer than {kept} bytes are free in {}", inner.config.dir.display()),
            })
    }

    /// Appends batches under the epochs that their headers say.
    pub(crate) fn take_in(&self, partition: &Rc<Partition>, batches: Vec<Batch>, permit: Permit) -> Appended {
        let inner = &self.0;
        let now = inner.host.now_ms();
        let config = partition.config.get();
        let permit = Rc::new(permit);
        let base_offset = partition.state.borrow().log_end();
        partition.note_work(batches.iter().map(|b| b.payload.len()).sum());
        for mut batch in batches {
            let direct = self.goes_to_segment(&batch.header);
            if batch.payload.len() <= PLACED_MAX {
                batch.payload = inner.arena.place(&batch.payload);
            }
            let restarted_at = {
                let mut state = partition.state.borrow_mut();
                let before = state.segments().last().map(|s| (s.base, s.end));
                state.assign(&mut batch.header, &config, now, direct);
                before
                    .filter(|(base, _)| *base == batch.header.segment_base)
                    .map(|(_, end)| end)
            };
            partition.note_in_index(&batch, restarted_at);
            self.count_producers(partition);
            self.push(partition, batch, direct, &config, &permit);
        }
        let log_start = partition.state.borrow().log_start();
        let end_offset = partition.state.borrow().log_end();
        self.trim_tail();
        // Whoever replicates the log waits for what is not durable yet, too.
        if partition.replicated.get() {
            partition.changed.wake_all();
        }
        Appended {
            base_offset,
            end_offset,
            log_start,
            duplicate: false,
        }
    }

    /// Keeps the producers remembered within what the shard may remember.
    pub(super) fn count_producers(&self, partition: &Partition) {
        let mut state = partition.state.borrow_mut();
        let (now, before) = (state.producers.len(), partition.producers.get());
        if now == before {
            return;
        }
        let max = self.0.config.producers_max;
        let mut all = self.0.producers.get() + now - before;
        let mut here = now;
        if now > before && all > max && here > 1 && state.producers.forget_idlest(all > max + max / 16) {
            here -= 1;
            all -= 1;
        }
        partition.producers.set(here);
        self.0.producers.set(all);
    }

    /// Large batches take the journal while it has plenty of room: one flush for those of all partitions. Where write-back falls
    /// behind they go straight to their segments, so that no append has to wait for it.
    fn goes_to_segment(&self, header: &BatchHeader) -> bool {
        let len = header.stored_len();
        header.payload_len as usize >= self.0.config.direct_bytes_min && !self.0.journal.has_plenty_of_room(len)
    }

    fn push(
        &self,
        partition: &Rc<Partition>,
        batch: Batch,
        direct: bool,
        config: &crate::log::LogConfig,
        permit: &Rc<Permit>,
    ) {
        let counters = &self.0.counters;
        counters.batches.set(counters.batches.get() + 1);
        counters
            .bytes_in
            .set(counters.bytes_in.get() + batch.payload.len() as u64);
        self.mark_dirty(partition);
        partition.tail.borrow_mut().push_back(TailEntry {
            batch: batch.clone(),
            written: false,
        });
        self.0
            .tail_order
            .borrow_mut()
            .push_back((Rc::clone(partition), batch.header.base_offset));
        self.0
            .tail_bytes
            .set(self.0.tail_bytes.get() + batch.payload.len() + TAIL_OVERHEAD);
        let unflushed = partition.unflushed_messages.get() + i64::from(batch.header.record_count);
        let must_flush = unflushed >= config.flush_messages || config.flush_ms == 0;
        partition.unflushed_messages.set(if must_flush { 0 } else { unflushed });
        if !must_flush {
            self.arm_flush_timer(config.flush_ms);
        }
        let header = batch.header;
        self.enter(
            partition,
            Entry {
                batch,
                must_flush,
                context: Completion::Batch {
                    partition: Rc::clone(partition),
                    end_offset: header.last_offset + 1,
                },
                permit: Some(Rc::clone(permit)),
            },
            direct,
        );
    }

    /// Puts a record without a payload into the journal, behind all that the partition has on its way, and waits until its completion
    /// shows.
    ///
    /// # Errors
    /// [`StorageError::Poisoned`] if the disk failed before that, [`StorageError::Left`].
    pub(crate) async fn mark<T>(
        &self,
        partition: &Rc<Partition>,
        header: BatchHeader,
        context: Completion,
        done: impl Fn() -> Option<T>,
    ) -> Result<T, StorageError> {
        let entry = Entry {
            batch: Batch {
                header,
                payload: Bytes::new(),
            },
            must_flush: true,
            context,
            permit: None,
        };
        self.enter(partition, entry, false);
        partition
            .changed
            .wait(|| done().map(Ok).or_else(|| partition.check_lasting().err().map(Err)))
            .await
    }

    /// Hands an entry to the journal, behind any large batch of its partition that is not written yet. What has left says nothing
    /// more there: the next copy of the partition may be there already.
    fn enter(&self, partition: &Rc<Partition>, entry: Entry<Completion>, direct: bool) {
        if partition.deleted.get() {
            return;
        }
        let mut gate = partition.gate.borrow_mut();
        if !direct && gate.entries.is_empty() {
            drop(gate);
            self.0.journal.push(entry);
            return;
        }
        gate.entries.push_back(Gated {
            entry,
            written: direct.then_some(false),
        });
        if !gate.running {
            gate.running = true;
            let (shard, partition) = (self.clone(), Rc::clone(partition));
            self.0.host.spawn(async move { shard.write_direct(&partition).await });
        }
    }

    /// Writes a partition's large batches to their segments, as many as are there with one flush, and lets
    /// what waits behind them go on.
    async fn write_direct(&self, partition: &Rc<Partition>) {
        loop {
            let group: Vec<Batch> = {
                let gate = partition.gate.borrow();
                let mut bytes = 0;
                gate.entries
                    .iter()
                    .filter(|g| g.written == Some(false))
                    .take_while(|g| {
                        let first = bytes == 0;
                        bytes += g.entry.batch.header.stored_len();
                        first || bytes <= DIRECT_GROUP_BYTES
                    })
                    .map(|g| g.entry.batch.clone())
                    .collect()
            };
            if group.is_empty() {
                partition.gate.borrow_mut().running = false;
                return;
            }
            let written = self.write_to_segments(partition, &group, None, false).await;
            if partition.deleted.get() {
                partition.gate.take();
                return;
            }
            let to_journal = match written {
                Ok(()) => false,
                Err(e) if e.is_not_opened() => {
                    tracing::warn!(partition = %partition.key, error = %e, "a segment is opened when that is possible again");
                    self.0.host.sleep(NOT_OPENED).await;
                    continue;
                }
                // The journal has room of its own; the segment gets the batch when the disk has room again.
                Err(e) if e.is_disk_full() && self.fits_journal(&group) => {
                    self.0.disk_full.set(true);
                    true
                }
                Err(e) => {
                    tracing::error!(partition = %partition.key, error = %e, "the partition is offline: its segment cannot be written");
                    partition.poison(&e.to_string());
                    partition.gate.borrow_mut().entries.clear();
                    partition.gate.borrow_mut().running = false;
                    return;
                }
            };
            if !to_journal {
                self.mark_written(partition, &group);
                self.0
                    .counters
                    .direct_batches
                    .set(self.0.counters.direct_batches.get() + group.len() as u64);
            }
            partition.changed.wake_all();
            let mut gate = partition.gate.borrow_mut();
            for gated in gate
                .entries
                .iter_mut()
                .filter(|g| g.written == Some(false))
                .take(group.len())
            {
                gated.written = Some(true);
                if !to_journal {
                    gated.entry.batch.header.kind = RecordKind::Extent;
                    partition.extents.borrow_mut().push(gated.entry.batch.header);
                }
            }
            while gate.entries.front().is_some_and(|g| g.written != Some(false)) {
                if let Some(gated) = gate.entries.pop_front() {
                    self.0.journal.push(gated.entry);
                }
            }
        }
    }

    fn fits_journal(&self, batches: &[Batch]) -> bool {
        batches
            .iter()
            .all(|b| b.header.stored_len() <= self.0.journal.record_bytes_max())
    }

    /// Writes batches of one partition where they belong and flushes every file touched, or leaves that to the caller.
    pub(crate) async fn write_to_segments(
        &self,
        partition: &Partition,
        batches: &[Batch],
        pace: Option<&Pace>,
        flush_later: bool,
    ) -> Result<(), StorageError> {
        let inner = &self.0;
        let missing = if flush_later {
            Missing::MakeUnsynced
        } else {
            Missing::Make
        };
        let mut flush_last = None;
        for run in segment::runs(batches) {
            let base = run[0].header.segment_base;
            // The file, if there is one, may be that of the next copy.
            partition.check_here()?;
            // What the log has given up need not be written any more.
            if segment_at(partition, base).is_none() {
                continue;
            }
            let file = inner.files.get(partition.key, base, missing).await;
            partition.check_here()?;
            let path = segment_path(inner.files.logs(), &partition.key, base);
            if segment_at(partition, base).is_none() {
                // Given up meanwhile: a file that was made after the removal has looked for it would stay.
                inner.files.forget(partition.key, Some(base));
                inner.removal.remove_file(&path);
                continue;
            }
            let file = file?;
            let end = run[run.len() - 1].header.segment_end();
            let sealed = partition.sealed_end(base);
            if sealed.is_none() && end >= inner.config.room_ahead_min {
                // Where the disk is nearly full, room is for what is there.
                file.make_room(end, self.disk_room() / ROOM_SHARE).await;
            }
            segment::write_run(&inner.host, &file, &path, run, pace).await?;
            inner
                .read_cache
                .invalidate(partition.key, base, run[0].header.segment_position, end);
            if let Some(sealed) = sealed {
                self.give_back_room(&file, &path, sealed).await;
            }
            if let Some((b, old, old_path)) = flush_last.replace((base, file, path))
                && b != base
                && !flush_later
            {
                flush(&**old, old_path).await?;
            }
        }
        if let Some((_, file, path)) = flush_last.filter(|_| !flush_later) {
            flush(&**file, path).await?;
        }
        Ok(())
    }

    /// Takes the room off a segment that nothing will be appended to. Without it the file is longer than it need be, no more.
    pub(crate) async fn give_back_room(&self, file: &SegmentFile<H::File>, path: &Path, end: u64) {
        if let Err(error) = file.shorten(align_up(end, BLOCK)).await {
            tracing::warn!(file = %path.display(), %error, "room that was made ahead stays in a segment");
        }
    }

    /// Notes that batches are in their segments, so that memory may let them go.
    pub(crate) fn mark_written(&self, partition: &Partition, batches: &[Batch]) {
        let mut tail = partition.tail.borrow_mut();
        let first = batches.first().map_or(0, |b| b.header.base_offset);
        let from = tail.partition_point(|e| e.batch.header.base_offset < first);
        // Both are in the order of offsets: one walk, however many there are.
        let mut batches = batches.iter().peekable();
        for entry in tail.iter_mut_from(from) {
            let offset = entry.batch.header.base_offset;
            while batches.next_if(|b| b.header.base_offset < offset).is_some() {}
            match batches.peek() {
                None => break,
                Some(batch) => entry.written |= batch.header.base_offset == offset,
            }
        }
        drop(tail);
        self.trim_tail();
    }

    /// Lets the oldest batches go while memory is over its budget; asks for write-back where that is in the way.
    pub(crate) fn trim_tail(&self) {
        let inner = &self.0;
        let mut order = inner.tail_order.borrow_mut();
        while inner.tail_bytes.get() > inner.config.tail_bytes {
            let Some((partition, offset)) = order.front() else {
                break;
            };
            let mut tail = partition.tail.borrow_mut();
            match tail.front() {
                Some(first) if first.batch.header.base_offset == *offset => {
                    if !first.written {
                        self.want_write_back();
                        break;
                    }
                    let size = first.batch.payload.len() + TAIL_OVERHEAD;
                    tail.pop_front();
                    inner.tail_bytes.set(inner.tail_bytes.get().saturating_sub(size));
                }
                // Its partition was deleted.
                _ => {}
            }
            drop(tail);
            order.pop_front();
        }
    }
}

async fn flush<F: HostFile>(file: &F, path: std::path::PathBuf) -> Result<(), StorageError> {
    file.flush().await.map_err(|source| StorageError::Io {
        operation: "flush",
        path,
        source,
    })
}

/// `Some` if all batches are a retry of what is there.
fn check_sequences(partition: &Partition, batches: &[Batch]) -> Result<Option<Appended>, AppendError> {
    let state = partition.state.borrow();
    for batch in batches {
        match state.producers.check(&batch.header)? {
            SequenceCheck::New => {}
            SequenceCheck::Duplicate {
                base_offset,
                last_offset,
            } => {
                return Ok(Some(Appended {
                    base_offset,
                    end_offset: last_offset + 1,
                    log_start: state.log_start(),
                    duplicate: true,
                }));
            }
        }
    }
    Ok(None)
}
