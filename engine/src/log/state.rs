//! Offsets and places: what a log decides, without doing it.

use crate::{
    batch::{BatchHeader, RecordKind},
    layout::BLOCK,
    log::{EpochCache, ProducerStates},
    types::{Offset, PartitionKey, align_up},
};
use rkyv::{Archive, Deserialize, Serialize};

/// The settings of a topic that its log acts on, with Kafka's names in snake case.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogConfig {
    /// A segment is closed before it grows beyond this.
    pub segment_bytes: u64,
    /// A segment is closed this long after its first append.
    pub segment_ms: i64,
    /// Records older than this may go; -1 for never.
    pub retention_ms: i64,
    /// The log is cut to this size; -1 for never.
    pub retention_bytes: i64,
    /// A flush is due after so many records; 1 is "before every acknowledgement".
    pub flush_messages: i64,
    /// A flush is due so long after an unflushed append.
    pub flush_ms: i64,
    /// A log of the broker's own: it goes on in the disk space that is kept free of clients' records.
    pub is_internal: bool,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            segment_bytes: 1 << 30,
            segment_ms: 7 * 24 * 3_600_000,
            retention_ms: 7 * 24 * 3_600_000,
            retention_bytes: -1,
            flush_messages: 1,
            flush_ms: i64::MAX,
            is_internal: false,
        }
    }
}

/// A segment as the log knows it.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentMeta {
    /// Offset of its first batch, and its name.
    pub base: Offset,
    /// Byte behind its last batch; the next one goes there if the segment is the last.
    pub end: u64,
    /// Largest timestamp in it, ms; negative while no record in it has one.
    pub max_timestamp: i64,
    /// Offset of the batch that has it.
    pub max_timestamp_offset: Offset,
    /// When its first batch was appended, ms by the broker's clock.
    pub created_ms: i64,
}

impl SegmentMeta {
    /// The same up to a position.
    #[must_use]
    pub fn until(self, end: u64) -> Self {
        Self { end, ..self }
    }
}

/// Where a log is cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cut {
    /// What stands at or behind `to` goes.
    Truncate {
        /// The new log end, where a batch begins.
        to: Offset,
        /// The segment that holds what stands before it, as it is then; `None` if nothing does.
        last: Option<SegmentMeta>,
    },
    /// Everything goes; the log goes on at `at`.
    Restart {
        /// The new log start and end.
        at: Offset,
    },
}

impl Cut {
    /// The log end after it.
    #[must_use]
    pub fn log_end(&self) -> Offset {
        match *self {
            Self::Truncate { to, .. } => to,
            Self::Restart { at } => at,
        }
    }

    /// The journal's record of it.
    #[must_use]
    pub fn header(&self, key: PartitionKey) -> BatchHeader {
        match *self {
            Self::Restart { at } => BatchHeader::marker(RecordKind::Restart, key, at),
            Self::Truncate { to, last } => {
                let mut header = BatchHeader::marker(RecordKind::Truncate, key, to);
                if let Some(last) = last {
                    header.segment_base = last.base;
                    header.segment_position = last.end;
                    header.max_timestamp = last.max_timestamp;
                    header.last_offset = last.max_timestamp_offset;
                    header.base_timestamp = last.created_ms;
                }
                header
            }
        }
    }

    /// What a journal's record says, if it is of this kind.
    #[must_use]
    pub fn of(header: &BatchHeader) -> Option<Self> {
        match header.kind {
            RecordKind::Restart => Some(Self::Restart { at: header.base_offset }),
            RecordKind::Truncate => Some(Self::Truncate {
                to: header.base_offset,
                last: (header.segment_position > 0).then_some(SegmentMeta {
                    base: header.segment_base,
                    end: header.segment_position,
                    max_timestamp: header.max_timestamp,
                    max_timestamp_offset: header.last_offset,
                    created_ms: header.base_timestamp,
                }),
            }),
            RecordKind::Batch | RecordKind::Extent | RecordKind::LogStart => None,
        }
    }
}

/// One partition's log.
///
/// Invariants: `log_start ≤ high_watermark ≤ durable_end ≤ log_end`; segments are ordered by base, the last is the one
/// appended to; the first segment's base is at or below `log_start`.
#[derive(Clone, Debug)]
pub struct LogState {
    /// Whose log.
    pub key: PartitionKey,
    log_start: Offset,
    high_watermark: Offset,
    durable_end: Offset,
    log_end: Offset,
    last_append_ms: Option<i64>,
    /// Leaderships.
    pub epochs: EpochCache,
    /// Idempotent producers.
    pub producers: ProducerStates,
    segments: Vec<SegmentMeta>,
}

impl LogState {
    /// An empty log.
    #[must_use]
    pub fn new(key: PartitionKey) -> Self {
        Self::restore(key, 0, 0, EpochCache::default(), ProducerStates::default(), Vec::new())
    }

    /// A log as a checkpoint describes it; everything in it is durable.
    #[must_use]
    pub fn restore(
        key: PartitionKey,
        log_start: Offset,
        log_end: Offset,
        epochs: EpochCache,
        producers: ProducerStates,
        segments: Vec<SegmentMeta>,
    ) -> Self {
        let state = Self {
            key,
            log_start,
            high_watermark: log_end,
            durable_end: log_end,
            log_end,
            last_append_ms: None,
            epochs,
            producers,
            segments,
        };
        state.assert_order();
        state
    }

    fn assert_order(&self) {
        assert!(
            self.log_start <= self.high_watermark
                && self.high_watermark <= self.durable_end
                && self.durable_end <= self.log_end,
            "{}: log start {} ≤ high watermark {} ≤ durable end {} ≤ log end {} does not hold",
            self.key,
            self.log_start,
            self.high_watermark,
            self.durable_end,
            self.log_end
        );
    }

    /// First offset that can be read.
    #[must_use]
    pub fn log_start(&self) -> Offset {
        self.log_start
    }

    /// Offset behind the last one that is as durable here as the flush policy asks.
    #[must_use]
    pub fn durable_end(&self) -> Offset {
        self.durable_end
    }

    /// Offset behind the last one that consumers may see: all below are as durable as the flush policy asks, on every
    /// replica in sync.
    #[must_use]
    pub fn high_watermark(&self) -> Offset {
        self.high_watermark
    }

    /// Next offset to be assigned.
    #[must_use]
    pub fn log_end(&self) -> Offset {
        self.log_end
    }

    /// When the last record was appended at the latest, ms by the broker's clock; `None` while that is not known.
    #[must_use]
    pub fn last_append_ms(&self) -> Option<i64> {
        self.last_append_ms
    }

    /// What is in the log was appended by `now_ms` at the latest, if nothing better is known.
    pub fn wrote_by(&mut self, now_ms: i64) {
        self.last_append_ms.get_or_insert(now_ms);
    }

    /// Whether nothing was ever appended.
    #[must_use]
    pub fn is_new(&self) -> bool {
        self.log_end == 0 && self.segments.is_empty()
    }

    /// All segments, oldest first.
    #[must_use]
    pub fn segments(&self) -> &[SegmentMeta] {
        &self.segments
    }

    /// Bytes of all segments.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.segments.iter().map(|s| s.end).sum()
    }

    /// Gives a batch its offsets and its place, rolling the segment if it is due. `direct` batches
    /// begin on a block of their own and leave the rest of their last one unused. Returns whether a new segment began.
    pub fn assign(&mut self, header: &mut BatchHeader, config: &LogConfig, now_ms: i64, direct: bool) -> bool {
        header.last_offset += self.log_end - header.base_offset;
        header.base_offset = self.log_end;
        let need = header.stored_len();
        let rolled = self.segments.last().is_none_or(|s| {
            s.end > BLOCK
                && (s.end + need > config.segment_bytes.max(2 * BLOCK) || now_ms - s.created_ms >= config.segment_ms)
        });
        if rolled {
            self.segments.push(SegmentMeta {
                base: header.base_offset,
                end: BLOCK,
                max_timestamp: i64::MIN,
                max_timestamp_offset: header.base_offset,
                created_ms: now_ms,
            });
        }
        let segment = self.segments.last_mut().expect("a segment was just ensured");
        header.segment_base = segment.base;
        header.segment_position = if direct {
            align_up(segment.end, BLOCK)
        } else {
            segment.end
        };
        self.apply(header, now_ms);
        if direct {
            self.close_block();
        }
        rolled
    }

    /// Takes in a batch whose offsets and place are decided: a new one, or one that replay brings back.
    pub fn apply(&mut self, header: &BatchHeader, now_ms: i64) {
        assert_eq!(header.base_offset, self.log_end, "{}: offsets are contiguous", self.key);
        if self.segments.last().is_none_or(|s| s.base != header.segment_base) {
            self.segments.push(SegmentMeta {
                base: header.segment_base,
                end: BLOCK,
                max_timestamp: i64::MIN,
                max_timestamp_offset: header.base_offset,
                created_ms: now_ms,
            });
        }
        let segment = self.segments.last_mut().expect("a segment was just ensured");
        segment.end = header.segment_end();
        if header.max_timestamp > segment.max_timestamp {
            segment.max_timestamp = header.max_timestamp;
            segment.max_timestamp_offset = header.last_offset;
        }
        self.epochs.note(header.leader_epoch, header.base_offset);
        self.producers.note(header, now_ms);
        self.log_end = header.last_offset + 1;
        self.last_append_ms = Some(now_ms);
    }

    /// Closes the last segment: the next append begins a new one.
    pub fn roll(&mut self, now_ms: i64) {
        if self.segments.last().is_some_and(|s| s.base < self.log_end) {
            self.segments.push(SegmentMeta {
                base: self.log_end,
                end: BLOCK,
                max_timestamp: i64::MIN,
                max_timestamp_offset: self.log_end,
                created_ms: now_ms,
            });
        }
    }

    /// Leaves the rest of the last block unused, so that what was written there is never rewritten.
    pub fn close_block(&mut self) {
        if let Some(segment) = self.segments.last_mut() {
            segment.end = align_up(segment.end, BLOCK);
        }
    }

    /// Moves the durable end; it never goes back but by a cut.
    pub fn advance_durable_end(&mut self, to: Offset) {
        // Batches that were cut while they were being written are durable for nothing.
        self.durable_end = to.min(self.log_end).max(self.durable_end);
    }

    /// What the replicas agree on is not known any more: after a restart a replica waits to be told.
    pub fn forget_high_watermark(&mut self) {
        self.high_watermark = self.log_start;
    }

    /// Cuts the log, and returns the segments that hold nothing any more. What follows begins in a segment of its own.
    pub fn cut(&mut self, cut: &Cut, now_ms: i64) -> Vec<SegmentMeta> {
        let end = cut.log_end();
        let keep = match cut {
            Cut::Truncate { to, .. } => self.segments.partition_point(|s| s.base < *to),
            Cut::Restart { .. } => 0,
        };
        let gone = self.segments.split_off(keep);
        self.log_end = end;
        self.durable_end = self.durable_end.min(end);
        self.high_watermark = self.high_watermark.min(end);
        self.log_start = self.log_start.min(end);
        match cut {
            Cut::Truncate { to, last } => {
                if let (Some(mine), Some(last)) = (self.segments.last_mut(), last)
                    && mine.base == last.base
                {
                    *mine = *last;
                }
                self.epochs.trim_end(*to);
                self.producers.truncate(*to);
                self.roll(now_ms);
            }
            Cut::Restart { at } => {
                self.epochs = EpochCache::default();
                self.producers = ProducerStates::default();
                (self.log_start, self.high_watermark, self.durable_end) = (*at, *at, *at);
            }
        }
        self.assert_order();
        gone
    }

    /// Moves the high watermark; it never goes back.
    pub fn advance_high_watermark(&mut self, to: Offset) -> bool {
        if to <= self.high_watermark {
            return false;
        }
        self.high_watermark = to;
        self.assert_order();
        true
    }

    /// Whether the log start may move to `to`.
    #[must_use]
    pub fn can_start_at(&self, to: Offset) -> bool {
        to <= self.high_watermark
    }

    /// Moves the log start (never back) and returns the segments that hold nothing any more.
    pub fn advance_log_start(&mut self, to: Offset) -> Vec<SegmentMeta> {
        if to > self.log_start {
            self.log_start = to;
            self.assert_order();
            self.epochs.trim_start(to);
        }
        let mut gone = Vec::new();
        // A segment ends where the next begins; the last one stays for appends.
        while self.segments.len() > 1 && self.segments[1].base <= self.log_start {
            gone.push(self.segments.remove(0));
        }
        gone
    }

    /// Index of the segment that holds `offset`.
    #[must_use]
    pub fn segment_index(&self, offset: Offset) -> Option<usize> {
        self.segments.partition_point(|s| s.base <= offset).checked_sub(1)
    }
}
