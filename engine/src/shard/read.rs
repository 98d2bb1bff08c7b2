//! Reading: from the batches in memory, else from segments through the read cache, with read-ahead.

use std::{cell::Cell, rc::Rc};

use bytes::{Bytes, BytesMut};

use crate::{
    batch::{self, Batch, BatchHeader, HeaderError, PayloadFormat},
    cache::{CHUNK, ChunkKey},
    error::{BatchError, ReadError, StorageError},
    host::{self, Host, HostFile},
    kafka_batch::{self, BATCH_HEADER_LEN, BatchInfo},
    layout::BLOCK,
    log::{LogState, SegmentMeta},
    segment::{Missing, segment_path},
    shard::{
        Shard,
        partition::{Cursor, Partition, Seen, in_memory},
    },
    types::{LeaderEpoch, Offset, PartitionKey, align_up},
};

/// Sequential readers remembered per partition; more of them only search the index again.
const CURSORS_MAX: usize = 16;
/// Pieces read ahead of a sequential reader: enough to keep the device busy while one is served.
const READ_AHEAD: u64 = 2;
/// Bytes of one read while the journal is in use: its next write stands behind all reads in the disk's queue (kernel-notes.md).
/// Divides [`CHUNK`].
const PIECE: usize = 128 << 10;
/// Most of these in flight.
pub(super) const READS_IN_USE: u64 = 2;

/// What a read gives.
#[derive(Debug, Default)]
pub struct Records {
    /// Whole batches, one after the other, as Kafka's fetch answers them. The first may begin below the offset asked for.
    pub bytes: Vec<u8>,
    /// First offset of the log.
    pub log_start: Offset,
    /// Offset behind the last one visible.
    pub high_watermark: Offset,
    /// Offset behind the last batch given.
    pub next_offset: Offset,
}

/// The record a look-up by time found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FoundTime {
    /// Its offset.
    pub offset: Offset,
    /// Its timestamp, ms.
    pub timestamp: i64,
    /// The epoch it was written under.
    pub leader_epoch: LeaderEpoch,
}
/// Reads what the records of a compressed batch say of their times: the engine does not unpack anything itself.
pub trait RecordTimes {
    /// Shows the offset (less the base offset) and the timestamp of each record in `packed`, in order, until `visit` says no. It may take
    /// long, and lets others run meanwhile.
    ///
    /// # Errors
    /// The batch cannot be read.
    fn each(
        &self,
        info: &BatchInfo,
        packed: Bytes,
        visit: &mut dyn FnMut(i32, i64) -> bool,
    ) -> impl Future<Output = Result<(), BatchError>>;
}

impl<H: Host> Shard<H> {
    /// Reads whole batches from the one that holds `offset`, up to the high watermark and to `max_bytes`; with
    /// `at_least_one` the first batch is given even if it alone is larger (KIP-74).
    ///
    /// # Errors
    /// [`ReadError::OffsetOutOfRange`], [`ReadError::UnknownPartition`], or what the disk says.
    pub async fn read(
        &self,
        key: PartitionKey,
        offset: Offset,
        max_bytes: usize,
        at_least_one: bool,
    ) -> Result<Records, ReadError> {
        let partition = self.partition(&key).ok_or(ReadError::UnknownPartition(key))?;
        let mut out = Records::default();
        // Growing step by step would copy a large answer several times.
        let expected = partition.bytes_available(offset, max_bytes as u64) as usize;
        out.bytes.reserve(expected.min(max_bytes));
        let mut next = offset;
        let nothing_fits = max_bytes == 0 && !at_least_one;
        let limit = |state: &LogState| if nothing_fits { offset } else { state.high_watermark() };
        let given = Cell::new(0);
        // Asked before a payload is read from the disk.
        let fits = |header: &BatchHeader| {
            let is_first = at_least_one && given.get() == 0;
            is_first || header.payload_len as usize <= max_bytes.saturating_sub(given.get())
        };
        let mut take = |batch: &Batch| {
            batch.write_served(&mut out.bytes);
            given.set(out.bytes.len());
            next = batch.header.last_offset + 1;
            out.bytes.len() < max_bytes
        };
        match self.visit_below(key, offset, limit, &fits, &mut take).await {
            // Damage further on is answered to whoever asks for it: what stands before it is sound.
            Err(ReadError::Storage(_)) if next > offset => {}
            other => other?,
        }
        if partition.deleted.get() {
            return Err(ReadError::UnknownPartition(key));
        }
        partition.note_work(out.bytes.len());
        let state = partition.state.borrow();
        out.log_start = state.log_start();
        out.high_watermark = state.high_watermark();
        out.next_offset = next;
        Ok(out)
    }

    /// Shows whole batches from the one that holds `offset`, below the high watermark, until `visit` says no.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub async fn visit(
        &self,
        key: PartitionKey,
        offset: Offset,
        mut visit: impl FnMut(&Batch) -> bool,
    ) -> Result<(), ReadError> {
        self.visit_below(key, offset, LogState::high_watermark, &|_| true, &mut visit)
            .await
    }

    /// As [`visit`](Self::visit), below what `limit` says of the log when the call begins, and up to the first batch that is not `wanted`.
    pub(crate) async fn visit_below(
        &self,
        key: PartitionKey,
        offset: Offset,
        limit: impl FnOnce(&LogState) -> Offset,
        wanted: &impl Fn(&BatchHeader) -> bool,
        visit: &mut impl FnMut(&Batch) -> bool,
    ) -> Result<(), ReadError> {
        let partition = self.partition(&key).ok_or(ReadError::UnknownPartition(key))?;
        let mut limit = {
            let state = partition.state.borrow();
            if offset < state.log_start() || offset > state.log_end() {
                return Err(out_of_range(&state, offset));
            }
            limit(&state)
        };
        let mut next = offset;
        let mut cuts = partition.cuts.get();
        let counters = self.counters();
        while next < limit {
            if partition.is_in_memory(next) {
                counters.tail_reads.set(counters.tail_reads.get() + 1);
                let tail = partition.tail.borrow();
                let from = tail.partition_point(|e| e.batch.header.last_offset < next);
                for entry in tail.iter_from(from) {
                    let header = &entry.batch.header;
                    if header.last_offset >= limit || !wanted(header) || !visit(&entry.batch) {
                        return Ok(());
                    }
                }
                return Ok(());
            }
            counters.segment_reads.set(counters.segment_reads.get() + 1);
            let until = partition
                .tail
                .borrow()
                .front()
                .map_or(limit, |first| first.batch.header.base_offset)
                .min(limit);
            match self.visit_segments(&partition, next, until, wanted, visit).await {
                Ok(Some(reached)) => next = reached,
                Ok(None) => return Ok(()),
                Err(error) => {
                    // What was read may have been removed meanwhile.
                    if partition.deleted.get() {
                        return Err(ReadError::UnknownPartition(key));
                    }
                    let state = partition.state.borrow();
                    if next < state.log_start() || next > state.log_end() {
                        return Err(out_of_range(&state, next));
                    }
                    if cuts == partition.cuts.get() {
                        return Err(error);
                    }
                    // What stands there now is read instead.
                    cuts = partition.cuts.get();
                    limit = limit.min(state.log_end());
                }
            }
        }
        Ok(())
    }

    /// Shows the batches of `[offset, until)` from segments. `None` if `visit` said no, else the offset reached.
    async fn visit_segments(
        &self,
        partition: &Rc<Partition>,
        offset: Offset,
        until: Offset,
        wanted: &impl Fn(&BatchHeader) -> bool,
        visit: &mut impl FnMut(&Batch) -> bool,
    ) -> Result<Option<Offset>, ReadError> {
        let cuts = partition.cuts.get();
        let mut next = offset;
        let mut place = self.locate(partition, offset, cuts).await?;
        while next < until {
            let Some(meta) = segment_at(partition, place.base) else {
                // Retention removed it meanwhile.
                return Err(out_of_range(&partition.state.borrow(), offset));
            };
            let segment = Seen { meta, cuts };
            let Some((header, position)) = self.next_header(partition, &segment, place.position).await? else {
                match segment_after(partition, meta.base) {
                    Some(following) => {
                        place = Cursor {
                            offset: following.base,
                            base: following.base,
                            position: BLOCK,
                        };
                        continue;
                    }
                    None => return Err(self.missing(partition, &segment, place.position, next).into()),
                }
            };
            if header.base_offset > next {
                return Err(self.missing(partition, &segment, position, next).into());
            }
            place.position = position + header.stored_len();
            if header.last_offset < next {
                continue;
            }
            let here = Cursor {
                offset: header.base_offset,
                position,
                ..place
            };
            if !wanted(&header) {
                // Whoever took nothing has no need of what comes next.
                if next == offset {
                    self.keep_place(partition, here, cuts);
                } else {
                    self.remember(partition, here, cuts);
                }
                return Ok(None);
            }
            let payload = self
                .read_bytes(
                    partition,
                    &segment,
                    position + batch::HEADER_LEN as u64,
                    header.payload_len as usize,
                )
                .await?;
            if crc32c::crc32c(&payload) != header.payload_crc {
                return Err(self
                    .corrupt(partition, &segment, position, "payload checksum differs")
                    .into());
            }
            next = header.last_offset + 1;
            place.offset = next;
            if !visit(&Batch { header, payload }) {
                self.remember(partition, here, cuts);
                return Ok(None);
            }
        }
        self.remember(partition, place, cuts);
        Ok(Some(next))
    }

    /// Keeps where a reader is, unless the log was cut since that reader began.
    fn keep_place(&self, partition: &Partition, cursor: Cursor, cuts: u64) {
        let mut cursors = partition.cursors.borrow_mut();
        if partition.cuts.get() != cuts {
            return;
        }
        if cursors.len() == CURSORS_MAX {
            cursors.pop_front();
        }
        cursors.push_back(cursor);
    }

    /// The same, and reads ahead.
    fn remember(&self, partition: &Partition, cursor: Cursor, cuts: u64) {
        self.keep_place(partition, cursor, cuts);
        if partition.cuts.get() != cuts {
            return;
        }
        // A reader that was here once will be back for what follows.
        if let Some(segment) = segment_at(partition, cursor.base) {
            let index = cursor.position / CHUNK;
            for ahead in index..=index + READ_AHEAD {
                let key = ChunkKey {
                    key: partition.key,
                    base: cursor.base,
                    index: ahead,
                };
                if ahead * CHUNK >= segment.end
                    || self.0.read_cache.get(key, 1).is_some()
                    || self.0.read_cache.is_loading(key)
                {
                    continue;
                }
                let shard = self.clone();
                self.0.host.spawn(async move {
                    // A failure will be met, and answered, by the read itself.
                    let _ = shard.load_chunk(key, 1).await;
                });
            }
        }
    }

    async fn locate(&self, partition: &Rc<Partition>, offset: Offset, cuts: u64) -> Result<Cursor, ReadError> {
        let remembered = {
            let mut cursors = partition.cursors.borrow_mut();
            let at = cursors.iter().position(|c| c.offset == offset);
            at.and_then(|at| cursors.remove(at))
        };
        if let Some(cursor) = remembered
            && segment_at(partition, cursor.base).is_some()
        {
            return Ok(cursor);
        }
        let segment = {
            let state = partition.state.borrow();
            let index = (state.segment_index(offset)).ok_or_else(|| out_of_range(&state, offset))?;
            state.segments()[index]
        };
        let position = match offset == segment.base {
            true => BLOCK,
            false => {
                let seen = Seen { meta: segment, cuts };
                self.with_index(partition, &seen, |index| index.position_of(offset))
                    .await?
            }
        };
        Ok(Cursor {
            offset,
            base: segment.base,
            position,
        })
    }

    /// The first batch header at or after `position`; `None` at the segment's end. Unused rests of blocks are skipped.
    pub(crate) async fn next_header(
        &self,
        partition: &Rc<Partition>,
        segment: &Seen,
        mut position: u64,
    ) -> Result<Option<(BatchHeader, u64)>, ReadError> {
        while position + batch::HEADER_LEN as u64 <= segment.meta.end {
            let bytes = self.read_bytes(partition, segment, position, batch::HEADER_LEN).await?;
            let head = bytes.first_chunk().expect("read_bytes gives the length asked for");
            match BatchHeader::decode(head) {
                Ok(header)
                    if header.key == partition.key
                        && header.segment_base == segment.meta.base
                        && header.segment_position == position =>
                {
                    return Ok(Some((header, position)));
                }
                Err(HeaderError::Blank) => position = align_up(position + 1, BLOCK),
                Ok(_) => {
                    return Err(self
                        .corrupt(partition, segment, position, "a batch of another place stands here")
                        .into());
                }
                Err(HeaderError::Damaged) => {
                    return Err(self
                        .corrupt(partition, segment, position, "batch header checksum differs")
                        .into());
                }
            }
        }
        Ok(None)
    }

    /// Shows the headers of a segment's batches from `position`, where one stands, to `until`, or until `visit` says no: from the segment,
    /// and from memory where they may not be in it yet.
    pub(super) async fn visit_headers(
        &self,
        partition: &Rc<Partition>,
        segment: &Seen,
        mut position: u64,
        until: u64,
        visit: &mut impl FnMut(&BatchHeader) -> bool,
    ) -> Result<(), ReadError> {
        loop {
            // While this reads, batches are written and go from memory: what is there now is what is looked for in the segment.
            let written = {
                let tail = partition.tail.borrow();
                let first = in_memory(&tail, segment.meta.base).next();
                first.map_or(until, |h| h.segment_position).min(until)
            };
            if position >= written {
                break;
            }
            while let Some((header, at)) = self.next_header(partition, &segment.until(written), position).await? {
                if !visit(&header) {
                    return Ok(());
                }
                position = at + header.stored_len();
            }
            position = position.max(written);
        }
        for header in in_memory(&partition.tail.borrow(), segment.meta.base) {
            if (position..until).contains(&header.segment_position) && !visit(header) {
                break;
            }
        }
        Ok(())
    }

    pub(super) async fn read_bytes(
        &self,
        partition: &Rc<Partition>,
        segment: &Seen,
        position: u64,
        len: usize,
    ) -> Result<Bytes, ReadError> {
        let end = position + len as u64;
        let mut gathered: Option<BytesMut> = None;
        let mut at = position;
        loop {
            let index = at / CHUNK;
            let chunk_start = index * CHUNK;
            let until = (end.min(chunk_start + CHUNK) - chunk_start) as usize;
            let key = ChunkKey {
                key: partition.key,
                base: segment.meta.base,
                index,
            };
            let chunk = self.load_chunk(key, until).await;
            let chunk = chunk.inspect_err(|error| {
                if !error.is_shortage() {
                    self.take_offline(partition, segment, error);
                }
            })?;
            let from = (at - chunk_start) as usize;
            if chunk.len() < until {
                return Err(self
                    .corrupt(
                        partition,
                        segment,
                        chunk_start + chunk.len() as u64,
                        "the file ends before the log does",
                    )
                    .into());
            }
            let piece = chunk.slice(from..until);
            at = chunk_start + until as u64;
            match (&mut gathered, at == end) {
                (None, true) => return Ok(piece),
                (None, false) => {
                    let mut all = BytesMut::with_capacity(len);
                    all.extend_from_slice(&piece);
                    gathered = Some(all);
                }
                (Some(all), last) => {
                    all.extend_from_slice(&piece);
                    if last {
                        return Ok(gathered.take().unwrap_or_default().freeze());
                    }
                }
            }
        }
    }

    async fn load_chunk(&self, key: ChunkKey, until: usize) -> Result<Bytes, StorageError> {
        self.0.read_cache.load(key, until, self.read_chunk(key)).await
    }

    async fn read_chunk(&self, key: ChunkKey) -> Result<Bytes, StorageError> {
        let inner = &self.0;
        let file = inner.files.get(key.key, key.base, Missing::Refuse).await?;
        let mut out = host::aligned(CHUNK as usize);
        while out.len() < CHUNK as usize {
            let appends_wait = inner.journal.is_in_use();
            let len = if appends_wait {
                PIECE
            } else {
                CHUNK as usize - out.len()
            };
            let turn = if appends_wait {
                Some(inner.reading.acquire(1).await)
            } else {
                None
            };
            let (position, expected) = (key.index * CHUNK + out.len() as u64, out.len() + len);
            out = file
                .read_behind(out, position, len)
                .await
                .map_err(|source| StorageError::Io {
                    operation: "read",
                    path: segment_path(inner.files.logs(), &key.key, key.base),
                    source,
                })?;
            drop(turn);
            if out.len() < expected {
                break;
            }
        }
        Ok(out.freeze())
    }

    fn corrupt(&self, partition: &Partition, segment: &Seen, position: u64, reason: &str) -> StorageError {
        let base = segment.meta.base;
        let error = StorageError::Corrupt {
            path: segment_path(self.0.files.logs(), &partition.key, base),
            position,
            reason: reason.into(),
        };
        self.take_offline(partition, segment, &error);
        error
    }

    /// What is stored cannot be read, or is not what was written: on other nodes it may be sound, and they can lead.
    fn take_offline(&self, partition: &Partition, segment: &Seen, error: &StorageError) {
        let base = segment.meta.base;
        // The file of a segment that the log has given up, or that was cut, changes while it is still being read.
        if partition.deleted.get() || partition.cuts.get() != segment.cuts || segment_at(partition, base).is_none() {
            return;
        }
        if partition.check_healthy().is_ok() {
            tracing::error!(partition = %partition.key, %error, "stored records are damaged: the partition is offline for appends, sound records can \
                still be read; `millrace export` saves them from the stopped broker's folder");
        }
        partition.poison(&error.to_string());
    }

    fn missing(&self, partition: &Partition, segment: &Seen, position: u64, offset: Offset) -> StorageError {
        let reason = format!("offset {offset} should stand here and does not");
        self.corrupt(partition, segment, position, &reason)
    }

    /// The first record whose timestamp is at least `timestamp` (KIP-79), below the high watermark.
    ///
    /// # Errors
    /// As [`read`](Self::read); [`ReadError::Batch`] if a compressed batch has to be opened and does not unpack.
    pub async fn find_time(
        &self,
        key: PartitionKey,
        timestamp: i64,
        times: &impl RecordTimes,
    ) -> Result<Option<FoundTime>, ReadError> {
        self.find_time_below(key, timestamp, LogState::high_watermark, times)
            .await
    }

    /// As [`find_time`](Self::find_time), below what `limit` says of the log.
    pub(super) async fn find_time_below(
        &self,
        key: PartitionKey,
        timestamp: i64,
        limit: impl Fn(&LogState) -> Offset + Copy,
        times: &impl RecordTimes,
    ) -> Result<Option<FoundTime>, ReadError> {
        let partition = self.partition(&key).ok_or(ReadError::UnknownPartition(key))?;
        let (log_start, segments) = {
            let state = partition.state.borrow();
            (state.log_start(), state.segments().to_vec())
        };
        let Some(segment) = segments.iter().find(|s| s.max_timestamp >= timestamp) else {
            return Ok(None);
        };
        let seen = partition.seen(*segment);
        // Batches in memory may not be in the segment yet, so the index is asked for an offset and not for a place.
        let tail_start = partition.tail.borrow().front().map(|e| e.batch.header.base_offset);
        let mut from = segment.base.max(log_start);
        if tail_start.is_none_or(|t| from < t) {
            let begin = self
                .with_index(&partition, &seen, |index| index.offset_of_time(timestamp))
                .await?;
            from = from.max(begin.unwrap_or(segment.base));
        }
        loop {
            let holds_it = |batch: &Batch| batch.header.max_timestamp >= timestamp;
            let Some(batch) = self.first_batch(key, from, limit, holds_it).await? else {
                return Ok(None);
            };
            let mut found = None;
            let look = |record: FoundTime| {
                found = (record.timestamp >= timestamp).then_some(record);
                found.is_none()
            };
            each_record(&batch, log_start, times, look)
                .await
                .map_err(ReadError::Batch)?;
            if found.is_some() {
                return Ok(found);
            }
            // Of a batch that the log start cuts in two, the records that match may be gone.
            from = batch.header.last_offset + 1;
        }
    }

    /// The first batch from an offset on that is `wanted`.
    pub(super) async fn first_batch(
        &self,
        key: PartitionKey,
        from: Offset,
        limit: impl Fn(&LogState) -> Offset,
        wanted: impl Fn(&Batch) -> bool,
    ) -> Result<Option<Batch>, ReadError> {
        let mut found = None;
        let mut look = |batch: &Batch| {
            found = wanted(batch).then(|| batch.clone());
            found.is_none()
        };
        self.visit_below(key, from, limit, &|_| true, &mut look).await?;
        Ok(found)
    }
}

fn out_of_range(state: &LogState, offset: Offset) -> ReadError {
    ReadError::OffsetOutOfRange {
        offset,
        log_start: state.log_start(),
        log_end: state.log_end(),
    }
}

pub(super) fn segment_at(partition: &Partition, base: Offset) -> Option<SegmentMeta> {
    let state = partition.state.borrow();
    let segments = state.segments();
    let index = segments.binary_search_by_key(&base, |s| s.base).ok()?;
    Some(segments[index])
}

fn segment_after(partition: &Partition, base: Offset) -> Option<SegmentMeta> {
    let state = partition.state.borrow();
    let segments = state.segments();
    segments.get(segments.partition_point(|s| s.base <= base)).copied()
}

/// Shows the records of a batch from `from` on, until `visit` says no. Of a batch in a format that is not opened here, one stands for
/// all.
pub(super) async fn each_record(
    batch: &Batch,
    from: Offset,
    times: &impl RecordTimes,
    mut visit: impl FnMut(FoundTime) -> bool,
) -> Result<(), BatchError> {
    let header = &batch.header;
    let whole = FoundTime {
        offset: header.base_offset.max(from),
        timestamp: header.max_timestamp,
        leader_epoch: header.leader_epoch,
    };
    if header.format != PayloadFormat::KafkaV2 {
        visit(whole);
        return Ok(());
    }
    let (info, len) = kafka_batch::parse(&batch.payload)?;
    let mut visit = |delta: i32, timestamp: i64| {
        let offset = header.base_offset + i64::from(delta);
        offset < from
            || visit(FoundTime {
                offset,
                timestamp,
                ..whole
            })
    };
    let records = batch.payload.slice(BATCH_HEADER_LEN..len);
    if info.compression() == 0 {
        return kafka_batch::for_each_record(&records, &info, |r| visit(r.offset_delta, r.timestamp));
    }
    times.each(&info, records, &mut visit).await
}
