//! The indexes of segments: in memory while appends go on, in files, and made from the segments where neither knows enough.
//!
//! The active segment's index is written to its file as the segment grows, so that a start after a crash has to look through the rest
//! only. A file never says more than the checkpoint stored before it: what is not in a checkpoint may be lost, and other batches come
//! to stand in its place.

use std::rc::Rc;

use crate::{
    batch::{self, BatchHeader},
    error::ReadError,
    host::Host,
    index::{INTERVAL, IndexEntry, SegmentIndex},
    layout::BLOCK,
    segment::index_path,
    shard::{
        Shard,
        partition::{Partition, Seen, in_memory},
        read::segment_at,
    },
    types::Offset,
};

/// Entries that make the index of an active segment worth a file: less is looked through in no time.
const ACTIVE_INDEX_MIN: usize = 8;
/// A segment's index is written about so many times while the segment fills.
const STORED_PER_SEGMENT: u64 = 16;
/// Indexes of active segments written in one pass of write-back; others have to wait for the next.
const STORED_AT_ONCE: usize = 64;

impl<H: Host> Shard<H> {
    /// Asks the index of a segment, loading or making it if it is not in memory.
    pub(super) async fn with_index<T>(
        &self,
        partition: &Rc<Partition>,
        segment: &Seen,
        ask: impl Fn(&SegmentIndex) -> T,
    ) -> Result<T, ReadError> {
        // An index begun after a restart lacks the front of its segment. What it has may still be in memory only, so nobody must look
        // for it in the segment.
        if let Some(from) = partition.in_memory_index(segment.meta.base, |index| index.complete_from) {
            let front = match from > BLOCK {
                true => Some(self.index_below(partition, segment, from).await?),
                false => None,
            };
            let answer = partition.in_memory_index(segment.meta.base, |index| {
                if let Some(front) = front.filter(|_| index.complete_from == from) {
                    index.prepend(front);
                }
                ask(index)
            });
            // Meanwhile it may have got a file.
            if let Some(answer) = answer {
                return Ok(answer);
            }
        }
        if let Some(index) = self.0.index_cache.get(partition.key, segment.meta.base) {
            return Ok(ask(&index));
        }
        let index = Rc::new(self.index_below(partition, segment, segment.meta.end).await?);
        // What it says of batches that were cut meanwhile would be held against those that come in their place.
        if partition.cuts.get() == segment.cuts && !partition.deleted.get() {
            (self.0.index_cache).insert(partition.key, segment.meta.base, Rc::clone(&index));
        }
        Ok(ask(&index))
    }

    /// The index of a segment's batches below `until`: what its file says, what stands behind that in the segment, and what is in memory
    /// and may not be in the segment yet.
    async fn index_below(
        &self,
        partition: &Rc<Partition>,
        segment: &Seen,
        until: u64,
    ) -> Result<SegmentIndex, ReadError> {
        let (mut index, mut position) = (SegmentIndex::new(BLOCK), BLOCK);
        let path = index_path(self.0.files.logs(), &partition.key, segment.meta.base);
        if let Some(mut stored) = SegmentIndex::load(&self.0.host, &path).await {
            stored.forget_from(until);
            if let Some(last) = stored.last().copied() {
                let is_sealed = partition.sealed_end(segment.meta.base) == Some(until);
                if is_sealed && until <= last.position + INTERVAL {
                    return Ok(stored);
                }
                if self.stands(partition, segment, last).await? {
                    (index, position) = (stored, last.position);
                }
            }
        }
        let mut note = |header: &BatchHeader| {
            index.note(header);
            true
        };
        self.visit_headers(partition, segment, position, until, &mut note)
            .await?;
        Ok(index)
    }

    /// Whether a batch stands where an entry says. A power cut may have brought back the index of what was cut.
    async fn stands(&self, partition: &Rc<Partition>, segment: &Seen, entry: IndexEntry) -> Result<bool, ReadError> {
        let base = segment.meta.base;
        let is_it = |header: &BatchHeader| {
            (header.key, header.segment_base) == (partition.key, base)
                && (header.segment_position, header.base_offset) == (entry.position, entry.offset)
        };
        {
            let tail = partition.tail.borrow();
            if in_memory(&tail, base)
                .next()
                .is_some_and(|first| first.segment_position <= entry.position)
            {
                return Ok(in_memory(&tail, base).any(is_it));
            }
        }
        if entry.position + batch::HEADER_LEN as u64 > segment.meta.end {
            return Ok(false);
        }
        let bytes = self
            .read_bytes(partition, segment, entry.position, batch::HEADER_LEN)
            .await?;
        let head = bytes.first_chunk().expect("read_bytes gives the length asked for");
        Ok(BatchHeader::decode(head).is_ok_and(|header| is_it(&header)))
    }

    /// Writes the index files of closed segments, and of active ones that have grown by much, as of the checkpoint that was just stored.
    /// They are an aid: if one cannot be written it is made anew when it is needed.
    pub(super) async fn store_indexes(&self, partitions: &[Rc<Partition>]) {
        let mut active_left = STORED_AT_ONCE;
        for partition in partitions {
            let Some((active_base, end)) = partition.in_segments.borrow().active_end() else {
                continue;
            };
            // One that lacks the front of its segment stays in memory: whoever asks it first has the front looked through.
            let sealed: Vec<_> = (partition.sealed_indexes.borrow_mut())
                .extract_if(.., |(base, index)| *base < active_base && index.complete_from <= BLOCK)
                .collect();
            for (base, index) in sealed {
                self.store_index(partition, base, &index).await;
            }
            if active_left > 0 {
                active_left -= usize::from(self.store_active_index(partition, active_base, end).await);
            }
        }
    }

    /// Writes the index of the active segment as far as `end`, if it has grown by much since; returns whether it did.
    async fn store_active_index(&self, partition: &Rc<Partition>, base: Offset, end: u64) -> bool {
        let grown = end.saturating_sub(partition.index_stored.get());
        let much = (partition.config().segment_bytes / STORED_PER_SEGMENT).max(ACTIVE_INDEX_MIN as u64 * INTERVAL);
        if grown < much {
            return false;
        }
        let mut index = match &*partition.active_index.borrow() {
            Some((b, index)) if *b == base => index.clone(),
            // Another segment takes appends by now.
            _ => return false,
        };
        if index.complete_from > BLOCK {
            self.complete_index(partition, base);
            return false;
        }
        index.forget_from(end);
        partition.index_stored.set(end);
        self.store_index(partition, base, &index).await;
        true
    }

    /// Has the front of an active segment's index looked up, for one partition at a time; the next pass finds it whole.
    fn complete_index(&self, partition: &Rc<Partition>, base: Offset) {
        let segment = partition.state.borrow().segments().last().copied();
        let Some(segment) = segment.filter(|s| s.base == base).map(|s| partition.seen(s)) else {
            return;
        };
        if self.0.completing_index.replace(true) {
            return;
        }
        let (shard, partition) = (self.clone(), Rc::clone(partition));
        self.0.host.spawn(async move {
            // A failure will be met, and answered, by a read.
            let _ = shard.with_index(&partition, &segment, |_| ()).await;
            shard.0.completing_index.set(false);
        });
    }

    async fn store_index(&self, partition: &Partition, base: Offset, index: &SegmentIndex) {
        let path = index_path(self.0.files.logs(), &partition.key, base);
        let cuts = partition.cuts.get();
        let stored = index.store(&self.0.host, &path, partition.key, base).await;
        // What a reader made of the segment before may know less.
        self.0.index_cache.forget(partition.key, base);
        if let Err(error) = stored
            && !partition.deleted.get()
        {
            tracing::warn!(%error, "an index could not be stored and will be made anew when needed");
        }
        if partition.deleted.get() || partition.cuts.get() != cuts || segment_at(partition, base).is_none() {
            // Written behind the back of what took its batches away.
            self.0.removal.remove_file(&path);
        }
    }

    /// Called at a clean stop: the next start finds the index of the active segment too.
    pub(super) async fn store_active_indexes(&self) {
        for partition in self.partitions() {
            let active = partition.active_index.borrow().clone();
            // A file for each would only delay the stop.
            if let Some((base, index)) = active
                && index.len() >= ACTIVE_INDEX_MIN
                && index.complete_from <= BLOCK
            {
                self.store_index(&partition, base, &index).await;
            }
        }
    }
}
