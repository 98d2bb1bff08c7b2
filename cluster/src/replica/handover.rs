//! Gaps in the sequence numbers of idempotent producers (KIP-98) that close by themselves.
//!
//! A leader that refuses a batch before it is appended, or has just begun to lead, lacks batches whose producer has more in
//! flight. A gap (OUT_OF_ORDER_SEQUENCE_NUMBER) would have a producer that numbers anew then, as librdkafka does, write a second
//! time what is here and was not acknowledged; told to try again, it sends all of them in order.

use millrace_engine::{LeaderEpoch, kafka_batch::BatchInfo, log::ProducerStates};

/// How long producers may still send what they had in flight, ms: an answer ends the waiting at once, and so does a connection
/// that breaks.
pub const SPAN_MS: i64 = 10_000;

/// Epoch of a new partition's leadership ([`PartitionImage::new`](crate::metadata::PartitionImage::new)).
const FIRST_EPOCH: LeaderEpoch = 0;

/// Until when producers may still send again what was kept out of a partition's log, from the view of its leader: ms by any clock
/// that does not jump.
#[derive(Clone, Copy, Debug)]
pub struct Handover {
    until: i64,
}

impl Handover {
    /// Nothing was kept out.
    pub const NONE: Self = Self { until: i64::MIN };

    /// Something is, or may have been, kept out at `now`; producers know `span` ms later.
    #[must_use]
    pub fn at(now: i64, span: i64) -> Self {
        Self { until: now + span }
    }

    /// A leadership under `epoch` begins at `now`. The first one of a partition has no predecessor that producers may have written to.
    #[must_use]
    pub fn of_leadership(epoch: LeaderEpoch, now: i64) -> Self {
        if epoch == FIRST_EPOCH {
            Self::NONE
        } else {
            Self::at(now, SPAN_MS)
        }
    }

    /// Whether it is over.
    #[must_use]
    pub fn is_over(&self, now: i64) -> bool {
        now >= self.until
    }

    /// Whether `batch` is not what follows, perhaps because batches that its producer sent before it were kept out.
    #[must_use]
    pub fn keeps_out(&self, producers: &ProducerStates, batch: &BatchInfo, now: i64) -> bool {
        !self.is_over(now) && producers.misses_before(batch)
    }
}

impl Default for Handover {
    fn default() -> Self {
        Self::NONE
    }
}
