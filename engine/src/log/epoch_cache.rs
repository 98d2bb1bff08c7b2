//! Leader epoch → the offset it began at (KIP-101, KIP-279, KIP-320).

use rkyv::{Archive, Deserialize, Serialize};

use crate::types::{LeaderEpoch, Offset};

/// Where one leadership began.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub struct EpochStart {
    /// Leader epoch.
    pub epoch: LeaderEpoch,
    /// Offset of the first batch appended under it.
    pub start: Offset,
}

/// Epochs in order, both fields strictly growing.
#[derive(Archive, Serialize, Deserialize, Clone, Default, PartialEq, Eq, Debug)]
pub struct EpochCache {
    entries: Vec<EpochStart>,
}

impl EpochCache {
    /// Notes that a batch at `offset` was appended under `epoch`.
    pub fn note(&mut self, epoch: LeaderEpoch, offset: Offset) {
        match self.entries.last() {
            Some(last) if last.epoch >= epoch => {}
            _ => self.entries.push(EpochStart { epoch, start: offset }),
        }
    }

    /// The latest epoch that wrote anything.
    #[must_use]
    pub fn latest(&self) -> Option<LeaderEpoch> {
        self.entries.last().map(|e| e.epoch)
    }

    /// The earliest epoch of which anything is left.
    #[must_use]
    pub fn first(&self) -> Option<EpochStart> {
        self.entries.first().copied()
    }

    /// The largest epoch not above `epoch` and the offset where it ended: what a consumer or follower that
    /// last saw `epoch` may trust up to. `None` if no such epoch is known.
    #[must_use]
    pub fn end_offset(&self, epoch: LeaderEpoch, log_end: Offset) -> Option<(LeaderEpoch, Offset)> {
        let index = self.entries.partition_point(|e| e.epoch <= epoch).checked_sub(1)?;
        let end = self.entries.get(index + 1).map_or(log_end, |next| next.start);
        Some((self.entries[index].epoch, end))
    }

    /// The epoch that `offset` was written under.
    #[must_use]
    pub fn epoch_of(&self, offset: Offset) -> Option<LeaderEpoch> {
        let index = self.entries.partition_point(|e| e.start <= offset).checked_sub(1)?;
        Some(self.entries[index].epoch)
    }

    /// Forgets epochs that ended at or before `log_start`; the one it falls in now begins there.
    pub fn trim_start(&mut self, log_start: Offset) {
        let keep_from = self.entries.partition_point(|e| e.start <= log_start).saturating_sub(1);
        self.entries.drain(..keep_from);
        if let Some(first) = self.entries.first_mut() {
            first.start = first.start.max(log_start);
        }
    }

    /// Forgets what was written at or after `log_end`.
    pub fn trim_end(&mut self, log_end: Offset) {
        self.entries.retain(|e| e.start < log_end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(entries: &[(i32, i64)]) -> EpochCache {
        let mut c = EpochCache::default();
        for (epoch, start) in entries {
            c.note(*epoch, *start);
        }
        c
    }

    #[test]
    fn an_epoch_ends_where_the_next_began() {
        let c = cache(&[(0, 0), (2, 10), (5, 30)]);
        for (asked, expected) in [
            (-1, None),
            (0, Some((0, 10))),
            (1, Some((0, 10))),
            (2, Some((2, 30))),
            (5, Some((5, 42))),
            (9, Some((5, 42))),
        ] {
            assert_eq!(c.end_offset(asked, 42), expected, "epoch {asked}");
        }
    }

    #[test]
    fn trimming_keeps_the_epoch_that_the_log_starts_in() {
        let mut c = cache(&[(0, 0), (2, 10), (5, 30)]);
        c.trim_start(15);
        assert_eq!(c.end_offset(2, 42), Some((2, 30)));
        assert_eq!(c.end_offset(0, 42), None);
        assert_eq!(c.epoch_of(15), Some(2));
        c.trim_end(30);
        assert_eq!(c.latest(), Some(2));
    }
}
