//! What idempotent producers wrote last (KIP-98): a window of batches each, so that a retry is answered
//! with the first offset instead of being appended again, and a gap is refused.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
};

use rkyv::{Archive, Deserialize, Serialize};

use crate::{
    batch::BatchHeader,
    error::AppendError,
    kafka_batch::BatchInfo,
    slab::{Slab, Snapshot},
    types::{Offset, ProducerEpoch, ProducerId},
};

/// Batches that a client may have in flight with idempotence on.
pub const IN_FLIGHT: usize = 5;
/// Batches remembered per producer: those in flight, which a cut of the log may take away, and as many before them.
pub const WINDOW: usize = 2 * IN_FLIGHT;

/// Producers remembered per partition; above it one that has been idle for long is forgotten, as if it had expired.
pub const PRODUCERS_MAX: usize = 100_000;
/// Producers looked at for one that has been idle for long.
const LOOKS: usize = 32;

/// One remembered batch.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub struct WrittenBatch {
    /// First sequence number.
    pub first_sequence: i32,
    /// Last sequence number.
    pub last_sequence: i32,
    /// Offset of the first record.
    pub first_offset: Offset,
    /// Offset of the last record.
    pub last_offset: Offset,
}

/// One producer's state on one partition.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct ProducerEntry {
    /// Latest epoch.
    pub epoch: ProducerEpoch,
    /// Oldest first.
    pub window: VecDeque<WrittenBatch>,
    /// When it last wrote, ms since 1970 by the broker's clock.
    pub last_written_ms: i64,
}

impl ProducerEntry {
    /// Last sequence number written under the current epoch, -1 if none.
    #[must_use]
    pub fn last_sequence(&self) -> i32 {
        self.window.back().map_or(-1, |b| b.last_sequence)
    }

    fn last_offset(&self) -> Offset {
        self.window.back().map_or(-1, |b| b.last_offset)
    }
}

/// What a batch's sequence numbers say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SequenceCheck {
    /// To be appended.
    New,
    /// Already there.
    Duplicate {
        /// Its first offset.
        base_offset: Offset,
        /// Its last offset.
        last_offset: Offset,
    },
}

/// All producers of a partition.
#[derive(Clone, Default, Debug)]
pub struct ProducerStates {
    places: HashMap<ProducerId, usize>,
    entries: Slab<(ProducerId, ProducerEntry)>,
    /// Each once, by its last offset when it was put here: whoever is first and has not written since is the one idle longest.
    queue: BinaryHeap<Reverse<(Offset, ProducerId)>>,
}

impl PartialEq for ProducerStates {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.iter().all(|(id, entry)| other.get(id) == Some(entry))
    }
}

impl Eq for ProducerStates {}

impl FromIterator<(ProducerId, ProducerEntry)> for ProducerStates {
    fn from_iter<I: IntoIterator<Item = (ProducerId, ProducerEntry)>>(entries: I) -> Self {
        let mut states = Self::default();
        for (id, entry) in entries {
            let last_offset = entry.last_offset();
            states.add(id, entry, last_offset);
        }
        states
    }
}

/// Sequence numbers wrap from `i32::MAX` to 0.
fn add_sequence(sequence: i32, n: i32) -> i32 {
    ((i64::from(sequence) + i64::from(n)) % (i64::from(i32::MAX) + 1)) as i32
}

impl ProducerStates {
    /// What is to be done with a batch. Batches without producer id are always new.
    ///
    /// # Errors
    /// [`AppendError::ProducerFenced`] for an old epoch, [`AppendError::OutOfOrderSequence`] for a gap.
    pub fn check(&self, header: &BatchHeader) -> Result<SequenceCheck, AppendError> {
        if header.producer_id < 0 {
            return Ok(SequenceCheck::New);
        }
        let Some(entry) = self.get(header.producer_id) else {
            // Unknown or expired: any first sequence is taken, as Kafka does since KIP-360.
            return Ok(SequenceCheck::New);
        };
        let out_of_order = |expected| AppendError::OutOfOrderSequence {
            producer_id: header.producer_id,
            expected,
            got: header.base_sequence,
        };
        if header.producer_epoch < entry.epoch {
            return Err(AppendError::ProducerFenced {
                producer_id: header.producer_id,
                current: entry.epoch,
                got: header.producer_epoch,
            });
        }
        if header.producer_epoch > entry.epoch {
            return if header.base_sequence == 0 {
                Ok(SequenceCheck::New)
            } else {
                Err(out_of_order(0))
            };
        }
        let last = add_sequence(header.base_sequence, header.record_count - 1);
        if let Some(seen) = entry
            .window
            .iter()
            .find(|b| b.first_sequence == header.base_sequence && b.last_sequence == last)
        {
            return Ok(SequenceCheck::Duplicate {
                base_offset: seen.first_offset,
                last_offset: seen.last_offset,
            });
        }
        match entry.window.back() {
            None => Ok(SequenceCheck::New),
            Some(b) if add_sequence(b.last_sequence, 1) == header.base_sequence => Ok(SequenceCheck::New),
            Some(b) => Err(out_of_order(add_sequence(b.last_sequence, 1))),
        }
    }

    /// Whether batches that its producer sent before this one are missing: it is neither there nor what follows.
    #[must_use]
    pub fn misses_before(&self, batch: &BatchInfo) -> bool {
        if batch.producer_id < 0 {
            return false;
        }
        let entry = self.get(batch.producer_id);
        match entry.and_then(|e| e.window.back().map(|last| (e, last))) {
            Some((entry, last)) if batch.producer_epoch == entry.epoch => {
                let there = entry.window.iter().any(|b| b.first_sequence == batch.base_sequence);
                !there && add_sequence(last.last_sequence, 1) != batch.base_sequence
            }
            Some((entry, _)) => batch.producer_epoch > entry.epoch && batch.base_sequence != 0,
            None => batch.base_sequence != 0,
        }
    }

    /// Notes an appended batch. Noting a batch a second time (replay over a snapshot) changes nothing.
    pub fn note(&mut self, header: &BatchHeader, now_ms: i64) {
        let id = header.producer_id;
        if id < 0 {
            return;
        }
        let known = self.places.get(&id).copied();
        let place = known.unwrap_or_else(|| {
            if self.len() >= PRODUCERS_MAX {
                self.forget_idlest(self.len() >= PRODUCERS_MAX + PRODUCERS_MAX / 16);
            }
            self.add(
                id,
                ProducerEntry {
                    epoch: header.producer_epoch,
                    window: VecDeque::new(),
                    last_written_ms: now_ms,
                },
                header.last_offset,
            )
        });
        let there = |entry: &ProducerEntry| entry.window.back().is_some_and(|b| b.last_offset >= header.base_offset);
        if self.entries.get(place).is_none_or(|(_, entry)| there(entry)) {
            return;
        }
        let Some((_, entry)) = self.entries.get_mut(place) else {
            return;
        };
        if header.producer_epoch != entry.epoch {
            entry.epoch = header.producer_epoch;
            entry.window.clear();
        }
        if entry.window.len() == WINDOW {
            entry.window.pop_front();
        }
        entry.window.push_back(WrittenBatch {
            first_sequence: header.base_sequence,
            last_sequence: add_sequence(header.base_sequence, header.record_count - 1),
            first_offset: header.base_offset,
            last_offset: header.last_offset,
        });
        entry.last_written_ms = now_ms;
    }

    /// Forgets what was written at or after `log_end`. A producer of whom nothing is left is forgotten.
    pub fn truncate(&mut self, log_end: Offset) {
        let cut = |entry: &ProducerEntry| entry.window.iter().any(|b| b.first_offset >= log_end);
        let concerned: Vec<ProducerId> = self.iter().filter(|(_, e)| cut(e)).map(|(id, _)| id).collect();
        let mut gone = Vec::new();
        for id in concerned {
            if let Some((_, entry)) = self.places.get(&id).and_then(|place| self.entries.get_mut(*place)) {
                entry.window.retain(|b| b.first_offset < log_end);
                if entry.window.is_empty() {
                    gone.push(id);
                }
            }
        }
        self.forget(&gone);
    }

    /// Forgets producers that last wrote before `before_ms`.
    pub fn expire(&mut self, before_ms: i64) {
        let idle = self.iter().filter(|(_, e)| e.last_written_ms < before_ms);
        let gone: Vec<ProducerId> = idle.map(|(id, _)| id).collect();
        self.forget(&gone);
    }

    /// Forgets the producer that has been idle longest, unless that would take many looks: then nobody, or, at any rate, one that has been
    /// idle for long. Returns whether it did.
    pub fn forget_idlest(&mut self, at_any_rate: bool) -> bool {
        for _ in 0..LOOKS {
            let Some(Reverse((then, id))) = self.queue.pop() else {
                return false;
            };
            match self.get(id).map(ProducerEntry::last_offset) {
                Some(last) if last > then => self.queue.push(Reverse((last, id))),
                _ => {
                    self.remove(id);
                    return true;
                }
            }
        }
        let some = if at_any_rate { self.queue.pop() } else { None };
        if let Some(Reverse((_, id))) = some {
            self.remove(id);
        }
        some.is_some()
    }

    fn add(&mut self, id: ProducerId, entry: ProducerEntry, last_offset: Offset) -> usize {
        self.queue.push(Reverse((last_offset, id)));
        let place = self.entries.insert((id, entry));
        self.places.insert(id, place);
        place
    }

    fn remove(&mut self, id: ProducerId) {
        if let Some(place) = self.places.remove(&id) {
            self.entries.remove(place);
        }
    }

    fn forget(&mut self, gone: &[ProducerId]) {
        if gone.is_empty() {
            return;
        }
        for id in gone {
            self.remove(*id);
        }
        self.queue.retain(|Reverse((_, id))| self.places.contains_key(id));
    }

    fn get(&self, id: ProducerId) -> Option<&ProducerEntry> {
        let place = *self.places.get(&id)?;
        self.entries.get(place).map(|(_, entry)| entry)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Producers, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (ProducerId, &ProducerEntry)> {
        self.entries.iter().map(|(id, entry)| (*id, entry))
    }

    /// All of them as they are now; it costs little, however many there are.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot<(ProducerId, ProducerEntry)> {
        self.entries.snapshot()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        batch::{PayloadFormat, RecordKind},
        types::PartitionKey,
    };

    fn header(epoch: i16, sequence: i32, count: i32, offset: i64) -> BatchHeader {
        BatchHeader {
            kind: RecordKind::Batch,
            format: PayloadFormat::KafkaV2,
            key: PartitionKey {
                topic: uuid::Uuid::nil(),
                partition: 0,
            },
            base_offset: offset,
            last_offset: offset + i64::from(count) - 1,
            leader_epoch: 0,
            record_count: count,
            attributes: 0,
            base_timestamp: 0,
            max_timestamp: 0,
            producer_id: 7,
            producer_epoch: epoch,
            base_sequence: sequence,
            payload_len: 0,
            payload_crc: 0,
            segment_base: 0,
            segment_position: 0,
        }
    }

    #[test]
    fn sequences_are_checked_like_kafka_does() {
        let mut states = ProducerStates::default();
        let mut offset = 0;
        for (epoch, sequence, expected) in [
            (0, 5, "new"),
            (0, 5, "duplicate"),
            (0, 7, "new"),
            (0, 10, "gap"),
            (0, 3, "gap"),
            (1, 4, "gap"),
            (1, 0, "new"),
            (0, 9, "fenced"),
            (1, 2, "new"),
        ] {
            let h = header(epoch, sequence, 2, offset);
            let got = match states.check(&h) {
                Ok(SequenceCheck::New) => {
                    states.note(&h, 0);
                    offset += 2;
                    "new"
                }
                Ok(SequenceCheck::Duplicate { .. }) => "duplicate",
                Err(AppendError::OutOfOrderSequence { .. }) => "gap",
                Err(AppendError::ProducerFenced { .. }) => "fenced",
                Err(other) => panic!("{other}"),
            };
            assert_eq!(got, expected, "epoch {epoch} sequence {sequence}");
        }
    }

    #[test]
    fn the_window_is_ten_batches_and_wraps() {
        let mut states = ProducerStates::default();
        let mut sequence = i32::MAX - 3;
        let mut seen = Vec::new();
        for i in 0..13 {
            let h = header(0, sequence, 1, i);
            assert_eq!(states.check(&h).expect("in order"), SequenceCheck::New);
            states.note(&h, 0);
            seen.push(h);
            sequence = add_sequence(sequence, 1);
        }
        assert_eq!(sequence, 9);
        for h in &seen[3..] {
            assert!(matches!(
                states.check(h),
                Ok(SequenceCheck::Duplicate { base_offset, .. }) if base_offset == h.base_offset
            ));
        }
        assert!(matches!(
            states.check(&seen[2]),
            Err(AppendError::OutOfOrderSequence { .. })
        ));
    }

    #[test]
    fn a_cut_leaves_what_the_retries_of_all_in_flight_need() {
        let mut states = ProducerStates::default();
        for i in 0..20 {
            states.note(&header(0, i, 1, i64::from(i)), 0);
        }
        states.truncate(15);
        assert!(matches!(
            states.check(&header(0, 14, 1, 0)),
            Ok(SequenceCheck::Duplicate { base_offset: 14, .. })
        ));
        assert!(matches!(states.check(&header(0, 15, 1, 0)), Ok(SequenceCheck::New)));
        assert!(matches!(
            states.check(&header(0, 16, 1, 0)),
            Err(AppendError::OutOfOrderSequence { expected: 15, .. })
        ));
    }

    #[test]
    fn what_is_missing_is_known() {
        let mut states = ProducerStates::default();
        for i in 0..4 {
            states.note(&header(1, i, 1, i64::from(i)), 0);
        }
        let misses = |producer_id, producer_epoch, base_sequence| {
            let batch = BatchInfo {
                attributes: 0,
                last_offset_delta: 0,
                base_timestamp: 0,
                min_timestamp: 0,
                max_timestamp: 0,
                producer_id,
                producer_epoch,
                base_sequence,
                record_count: 1,
            };
            states.misses_before(&batch)
        };
        assert!(misses(7, 1, 6));
        assert!(!misses(7, 1, 4), "it is what follows");
        assert!(!misses(7, 1, 2), "it is there");
        // The producer began again, or is not known.
        assert!(misses(7, 2, 1) && misses(8, 0, 1));
        assert!(!misses(7, 2, 0) && !misses(8, 0, 0) && !misses(-1, -1, -1));
        assert!(!misses(7, 0, 3), "it is fenced");
    }

    #[test]
    fn who_has_been_idle_longest_is_forgotten() {
        let mut states = ProducerStates::default();
        let by = |producer_id, offset| BatchHeader {
            producer_id,
            ..header(0, offset as i32, 1, offset)
        };
        for id in 0..100 {
            states.note(&by(id, id), id);
        }
        for id in 0..50 {
            states.note(&by(id, 100 + id), 100 + id);
        }
        // Those that have written since are put where they belong, so many at a time.
        assert!(!states.forget_idlest(false));
        for idlest in 50..100 {
            assert!(states.get(idlest).is_some());
            assert!(states.forget_idlest(false) && states.get(idlest).is_none());
        }
        assert!(states.forget_idlest(false) && states.get(0).is_none());
        // Where all write all the time it is one of those that were behind the ones looked at.
        for id in 1..50 {
            states.note(&by(id, 200 + id), 200 + id);
        }
        assert!(states.forget_idlest(true) && states.get(33).is_none());
        assert_eq!((states.len(), states.queue.len()), (48, 48));
        // Nor is it who has only come.
        let mut few = ProducerStates::default();
        for (id, at) in [(1, 1), (1, 5), (2, 6)] {
            few.note(&by(id, at), at);
        }
        assert!(few.forget_idlest(false) && few.get(2).is_some());
    }

    #[test]
    fn noting_twice_changes_nothing() {
        let mut states = ProducerStates::default();
        for i in 0..4 {
            states.note(&header(0, i, 1, i64::from(i)), 0);
        }
        let before = states.clone();
        states.note(&header(0, 2, 1, 2), 9);
        assert_eq!(states, before);
    }
}
