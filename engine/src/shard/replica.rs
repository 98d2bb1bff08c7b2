//! What replication needs of a log: batches to send as they stand, batches appended at the offsets that a leader gave them,
//! and cuts where a follower's log is not its leader's.

use std::{cell::RefCell, rc::Rc};

use crate::{
    batch::{Batch, BatchHeader},
    error::{AppendError, BatchError, ReadError, StorageError},
    host::Host,
    layout::BLOCK,
    log::{Cut, LogState, SegmentMeta},
    segment::{Missing, segment_path},
    shard::{
        Shard,
        commit::Completion,
        partition::{Partition, Seen, TAIL_OVERHEAD},
    },
    sync::Permit,
    types::{Offset, PartitionKey, align_up},
};

impl<H: Host> Shard<H> {
    /// Whether the high watermark is moved by [`advance_high_watermark`](Self::advance_high_watermark) alone, as the replicas
    /// agree, or follows what is durable here.
    pub fn set_replicated(&self, partition: &Partition, replicated: bool) {
        if partition.replicated.replace(replicated) && !replicated {
            let end = partition.state.borrow().durable_end();
            self.advance_high_watermark(partition, end);
        }
    }

    /// Moves the high watermark of a replicated partition, as far as what is durable here; it never goes back.
    pub fn advance_high_watermark(&self, partition: &Partition, to: Offset) {
        let mut state = partition.state.borrow_mut();
        let to = to.min(state.durable_end());
        if state.advance_high_watermark(to) {
            drop(state);
            partition.changed.wake_all();
        }
    }

    /// Batches from the one that holds `offset` to the log end, durable or not, until they are `max_bytes`; at least one
    /// if there is any.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub async fn batches_from(
        &self,
        key: PartitionKey,
        offset: Offset,
        max_bytes: usize,
    ) -> Result<Vec<Batch>, ReadError> {
        let mut batches = Vec::new();
        let mut bytes = 0;
        let visited = self
            .visit_below(key, offset, LogState::log_end, &|_| true, &mut |batch: &Batch| {
                bytes += batch.payload.len();
                if batches.is_empty() || bytes <= max_bytes {
                    batches.push(batch.clone());
                }
                bytes < max_bytes
            })
            .await;
        match visited {
            // Damage further on is met by whoever asks for it.
            Err(ReadError::Storage(_)) if !batches.is_empty() => {}
            other => other?,
        }
        Ok(batches)
    }

    /// Appends a leader's batches, which must go on where the log ends, under its offsets and epochs; returns the log end.
    /// They are durable when [`Partition::wait_durable`] of it says so.
    ///
    /// # Errors
    /// [`AppendError`]; nothing is appended then.
    pub fn append_replicated(
        &self,
        key: PartitionKey,
        batches: Vec<Batch>,
        permit: Permit,
    ) -> Result<Offset, AppendError> {
        let partition = self.partition(&key).ok_or(AppendError::UnknownPartition(key))?;
        let free = self.check_appendable(&partition, &batches)?;
        let (mut next, mut epoch) = partition.with_state(|s| (s.log_end(), s.epochs.latest().unwrap_or(-1)));
        for Batch { header, payload } in &batches {
            let span = header.last_offset.checked_sub(header.base_offset);
            let whole = header.key == key
                && header.base_offset == next
                && header.leader_epoch >= epoch
                && span.is_some_and(|s| (0..=i64::from(i32::MAX)).contains(&s))
                && header.payload_len as usize == payload.len();
            if !whole {
                return Err(BatchError::Invalid {
                    reason: "a leader's batch does not go on where the log ends",
                }
                .into());
            }
            let actual = crc32c::crc32c(payload);
            if actual != header.payload_crc {
                return Err(BatchError::Crc {
                    stated: header.payload_crc,
                    actual,
                }
                .into());
            }
            (next, epoch) = (header.last_offset + 1, header.leader_epoch);
        }
        self.0.disk_free.set(free);
        Ok(self.take_in(&partition, batches, permit).end_offset)
    }

    /// Cuts what stands at or behind `to`, where a batch begins. Nothing may be appended meanwhile.
    ///
    /// # Errors
    /// [`StorageError::Poisoned`] if that would cut what all replicas in sync have acknowledged, [`StorageError::Left`], and any failure
    /// of the disk.
    pub async fn truncate(&self, partition: &Rc<Partition>, to: Offset) -> Result<(), ReadError> {
        partition.check_writable()?;
        let (high_watermark, log_end) = partition.with_state(|s| (s.high_watermark(), s.log_end()));
        if to < high_watermark {
            let stage = format!("asked to cut the log at {to}, below its high watermark {high_watermark}");
            tracing::error!(partition = %partition.key, "{stage}: refused, the partition is offline");
            partition.poison(&stage);
            return Err(StorageError::Poisoned { stage }.into());
        }
        if to >= log_end {
            return Ok(());
        }
        let last = match partition.with_state(|s| s.segments().iter().rfind(|s| s.base < to).copied()) {
            Some(segment) => Some(self.kept_of(partition, segment, to).await?),
            None => None,
        };
        Ok(self.cut(partition, Cut::Truncate { to, last }).await?)
    }

    /// Empties the log; it goes on at `at`. For a follower that ends before its leader's log begins. Nothing may be appended
    /// meanwhile.
    ///
    /// # Errors
    /// Any failure of the disk.
    pub async fn restart_at(&self, partition: &Rc<Partition>, at: Offset) -> Result<(), StorageError> {
        partition.check_writable()?;
        self.cut(partition, Cut::Restart { at }).await
    }

    /// What a segment is once everything at or behind `to` is gone.
    async fn kept_of(
        &self,
        partition: &Rc<Partition>,
        segment: SegmentMeta,
        to: Offset,
    ) -> Result<SegmentMeta, ReadError> {
        {
            let tail = partition.tail.borrow();
            let at = tail.partition_point(|e| e.batch.header.base_offset < to);
            let last = at.checked_sub(1).and_then(|at| tail.iter_from(at).next());
            if let Some(header) = last.map(|e| &e.batch.header)
                && header.segment_base == segment.base
                && segment.max_timestamp_offset < to
            {
                return Ok(segment.until(header.segment_end()));
            }
        }
        let seen = partition.seen(segment);
        // The batches before `to` since the last index entry, if the largest timestamp is among them.
        let near = (self.with_index(partition, &seen, |index| index.entry_of(to - 1).copied())).await?;
        if let Some(near) = near {
            let kept = self.last_kept(partition, &seen, near.position, to).await?;
            if kept.max_timestamp > near.max_timestamp_before {
                return Ok(kept);
            }
        }
        self.last_kept(partition, &seen, BLOCK, to).await
    }

    /// What a segment is by its batches from `position` on that stand before `to`.
    async fn last_kept(
        &self,
        partition: &Rc<Partition>,
        segment: &Seen,
        position: u64,
        to: Offset,
    ) -> Result<SegmentMeta, ReadError> {
        let mut kept = SegmentMeta {
            end: BLOCK,
            max_timestamp: i64::MIN,
            max_timestamp_offset: segment.meta.base,
            ..segment.meta
        };
        let mut note = |header: &BatchHeader| {
            if header.base_offset >= to {
                return false;
            }
            kept.end = header.segment_end();
            if header.max_timestamp > kept.max_timestamp {
                (kept.max_timestamp, kept.max_timestamp_offset) = (header.max_timestamp, header.last_offset);
            }
            true
        };
        (self.visit_headers(partition, segment, position, segment.meta.end, &mut note)).await?;
        Ok(kept)
    }

    async fn cut(&self, partition: &Rc<Partition>, cut: Cut) -> Result<(), StorageError> {
        let done: Rc<RefCell<Option<Vec<SegmentMeta>>>> = Rc::default();
        let context = Completion::Cut {
            partition: Rc::clone(partition),
            cut,
            done: Rc::clone(&done),
        };
        let gone = (self.mark(partition, cut.header(partition.key), context, || done.take())).await?;
        // A pass of write-back that began before may still be writing what was cut.
        self.0
            .writeback_done
            .wait(|| (!self.0.writeback_running.get()).then_some(()))
            .await;
        partition.check_here()?;
        let end = cut.log_end();
        partition.unwritten_from.set(partition.unwritten_from.get().min(end));
        self.remove_segments(partition, gone);
        if let Cut::Truncate { last: Some(last), .. } = cut {
            self.shorten(partition, last).await?;
        }
        Ok(())
    }

    /// Takes the cut batches off the end of a segment's file, so that nobody who reads files finds them.
    async fn shorten(&self, partition: &Partition, segment: SegmentMeta) -> Result<(), StorageError> {
        let files = &self.0.files;
        let path = segment_path(files.logs(), &partition.key, segment.base);
        let file = match files.get(partition.key, segment.base, Missing::Refuse).await {
            Ok(file) => file,
            // Nothing of it was written yet.
            Err(StorageError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        partition.check_here()?;
        file.shorten(align_up(segment.end, BLOCK))
            .await
            .map_err(StorageError::io("truncate", &path))
    }

    /// The part of a cut that happens when its record is durable.
    pub(crate) fn apply_cut(&self, partition: &Rc<Partition>, cut: &Cut) -> Vec<SegmentMeta> {
        let end = cut.log_end();
        let gone = partition.state.borrow_mut().cut(cut, self.0.host.now_ms());
        let all = matches!(cut, Cut::Restart { .. });
        let mut freed = 0;
        {
            let mut tail = partition.tail.borrow_mut();
            while tail.back().is_some_and(|e| all || e.batch.header.base_offset >= end) {
                freed += tail.pop_back().map_or(0, |e| e.batch.payload.len() + TAIL_OVERHEAD);
            }
        }
        self.0.tail_bytes.set(self.0.tail_bytes.get().saturating_sub(freed));
        (partition.extents.borrow_mut()).retain(|e| !all && e.base_offset < end);
        // What they say of places may not hold any more; they are made anew when they are asked.
        let last = match cut {
            Cut::Truncate { last, .. } => last.map(|l| l.base),
            Cut::Restart { .. } => None,
        };
        let stays = |base: Offset| gone.iter().all(|g| g.base != base) && Some(base) != last;
        partition.cuts.set(partition.cuts.get() + 1);
        self.0.index_cache.forget_all(partition.key);
        partition.sealed_indexes.borrow_mut().retain(|(base, _)| stays(*base));
        partition.active_index.borrow_mut().take_if(|(base, _)| !stays(*base));
        partition.cursors.borrow_mut().clear();
        self.0.read_cache.forget(partition.key);
        if let Some(base) = last {
            let path = crate::segment::index_path(self.0.files.logs(), &partition.key, base);
            self.0.removal.remove_file(&path);
        }
        self.mark_dirty(partition);
        gone
    }
}
