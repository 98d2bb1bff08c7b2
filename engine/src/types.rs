//! The words of the domain, one meaning each.

use std::fmt;

use rustc_hash::FxHashMap;
use uuid::Uuid;

/// Position of a record in a partition: 0-based, contiguous, assigned by the leader.
pub type Offset = i64;
/// Generation of a partition's leadership; grows with every change of leader or restart of it.
pub type LeaderEpoch = i32;
/// Identity of an idempotent producer; -1 where a batch has none.
pub type ProducerId = i64;
/// Generation of a producer id; a lower one than the latest is fenced.
pub type ProducerEpoch = i16;

/// "No producer id" as a Kafka record batch writes it.
pub const NO_PRODUCER_ID: ProducerId = -1;

/// A partition, by the id of its topic: names can be used again, ids never are.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PartitionKey {
    /// Topic id.
    pub topic: Uuid,
    /// Partition index within the topic.
    pub partition: u32,
}

/// A map by partitions. Topic ids are drawn by us and indexes are those of partitions that exist, so nobody outside chooses
/// keys that collide, and a quick hash will do.
pub type PartitionMap<T> = FxHashMap<PartitionKey, T>;

impl fmt::Debug for PartitionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.topic.simple(), self.partition)
    }
}

impl fmt::Display for PartitionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// `n` rounded up to a multiple of `to`, a power of two.
#[must_use]
pub const fn align_up(n: u64, to: u64) -> u64 {
    debug_assert!(to.is_power_of_two());
    (n + to - 1) & !(to - 1)
}
