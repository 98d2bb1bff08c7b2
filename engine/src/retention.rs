//! Which segments may go: a pure plan.

use crate::{
    log::{LogConfig, LogState},
    types::Offset,
};

/// Clocks differ by less, ms.
const FUTURE_MS: i64 = 3_600_000;

/// The offset the log should start at, if retention wants it further on. Only whole segments go, oldest first;
/// the active one goes too once everything in it has expired (`roll` is then set: it must be closed first).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    /// New log start offset.
    pub log_start: Offset,
    /// The active segment must make room for an empty one.
    pub roll: bool,
}

/// What retention by time and by size asks for now; `None` if nothing.
#[must_use]
pub fn plan(state: &LogState, config: &LogConfig, now_ms: i64) -> Option<Plan> {
    let segments = state.segments();
    let end_of = |i: usize| segments.get(i + 1).map_or(state.log_end(), |next| next.base);
    let mut keep_from = 0;
    if config.retention_ms >= 0 {
        while keep_from < segments.len() {
            let segment = &segments[keep_from];
            let is_empty = segment.base >= end_of(keep_from);
            let newest = newest(state, keep_from);
            if is_empty || newest.is_none_or(|newest| now_ms.saturating_sub(newest) <= config.retention_ms) {
                break;
            }
            keep_from += 1;
        }
    }
    if config.retention_bytes >= 0 {
        let mut excess = state.size_bytes().saturating_sub(config.retention_bytes as u64);
        for (i, segment) in segments.iter().enumerate() {
            // The active segment is never cut for its size.
            if i + 1 == segments.len() || segment.end > excess {
                break;
            }
            excess -= segment.end;
            keep_from = keep_from.max(i + 1);
        }
    }
    let log_start = keep_from.checked_sub(1).map(end_of)?;
    (log_start > state.log_start() && state.can_start_at(log_start)).then_some(Plan {
        log_start,
        roll: keep_from == segments.len(),
    })
}

/// The time that a segment's age counts from, ms: that of its newest record; if none of its records has a time, when the last one was
/// written, at the latest. `None` while that is not known.
fn newest(state: &LogState, index: usize) -> Option<i64> {
    let segments = state.segments();
    let stated = Some(segments[index].max_timestamp).filter(|time| *time >= 0);
    stated.or_else(|| match segments.get(index + 1) {
        Some(next) => Some(next.created_ms),
        None => state.last_append_ms(),
    })
}

/// The largest timestamp of the oldest segment, if it lies so far ahead that the segment outlives what retention says; what follows it
/// stays, too.
#[must_use]
pub fn held_by_the_future(state: &LogState, config: &LogConfig, now_ms: i64) -> Option<i64> {
    let oldest = state.segments().first()?.max_timestamp;
    (config.retention_ms >= 0 && oldest.saturating_sub(now_ms) > FUTURE_MS).then_some(oldest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        log::{EpochCache, ProducerStates, SegmentMeta},
        types::PartitionKey,
    };

    fn log(segments: &[(Offset, u64, i64)], log_end: Offset) -> LogState {
        LogState::restore(
            PartitionKey {
                topic: uuid::Uuid::nil(),
                partition: 0,
            },
            0,
            log_end,
            EpochCache::default(),
            ProducerStates::default(),
            segments
                .iter()
                .map(|&(base, end, max_timestamp)| SegmentMeta {
                    base,
                    end,
                    max_timestamp,
                    max_timestamp_offset: base,
                    created_ms: 0,
                })
                .collect(),
        )
    }

    #[test]
    fn a_segment_without_times_ages_by_when_it_was_written() {
        let config = LogConfig {
            retention_ms: 100,
            ..LogConfig::default()
        };
        for unknown in [i64::MIN, -2, -1] {
            let mut state = log(&[(0, 100, unknown), (50, 100, unknown)], 90);
            state.roll(1_000);
            // The last segment is empty, and says when the one before had its last record at the latest.
            assert_eq!(
                plan(&state, &config, 1_100),
                Some(Plan {
                    log_start: 50,
                    roll: false
                })
            );
            assert_eq!(
                plan(&state, &config, 1_101),
                Some(Plan {
                    log_start: 90,
                    roll: false
                })
            );
        }
        // Nobody knows when the last record of the active segment was written, until something is.
        let mut state = log(&[(0, 100, -1)], 90);
        assert_eq!(plan(&state, &config, i64::MAX), None);
        state.wrote_by(500);
        assert_eq!(plan(&state, &config, 600), None);
        assert_eq!(
            plan(&state, &config, 601),
            Some(Plan {
                log_start: 90,
                roll: true
            })
        );
        state.wrote_by(400);
        assert_eq!(state.last_append_ms(), Some(500), "what is known stays");
    }

    #[test]
    fn times_far_ahead_are_told_of() {
        let config = LogConfig::default();
        let state = log(&[(0, 100, i64::MAX), (50, 100, 20)], 90);
        assert_eq!(held_by_the_future(&state, &config, 1_000), Some(i64::MAX));
        assert_eq!(plan(&state, &config, i64::MAX), None);
        let state = log(&[(0, 100, 1_000 + FUTURE_MS)], 90);
        assert_eq!(held_by_the_future(&state, &config, 1_000), None);
    }

    #[test]
    fn whole_segments_go_oldest_first() {
        let state = log(&[(0, 100, 10), (50, 100, 20), (80, 40, 30)], 90);
        for (retention_ms, retention_bytes, now, expected) in [
            (-1, -1, 1_000, None),
            (5, -1, 14, None),
            (5, -1, 17, Some((50, false))),
            (5, -1, 30, Some((80, false))),
            (5, -1, 40, Some((90, true))),
            (-1, 240, 0, None),
            (-1, 140, 0, Some((50, false))),
            (-1, 0, 0, Some((80, false))),
        ] {
            let config = LogConfig {
                retention_ms,
                retention_bytes,
                ..LogConfig::default()
            };
            assert_eq!(
                plan(&state, &config, now).map(|p| (p.log_start, p.roll)),
                expected,
                "retention {retention_ms} ms, {retention_bytes} B at {now}"
            );
        }
    }
}
