//! Which segments may go: a pure plan.

use crate::{
    log::{LogConfig, LogState},
    types::Offset,
};

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
            let empty = segment.max_timestamp == i64::MIN;
            if empty || now_ms.saturating_sub(segment.max_timestamp) <= config.retention_ms {
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
