//! Committed offsets of one group.

use std::collections::BTreeMap;

/// What a commit says of one partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Committed {
    /// Next offset to be consumed.
    pub offset: i64,
    /// Epoch of the last record consumed, -1 unknown.
    pub leader_epoch: i32,
    /// The client's note.
    pub metadata: String,
    /// When, ms.
    pub commit_ms: i64,
}

/// By topic and partition.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Offsets {
    by_topic: BTreeMap<String, BTreeMap<i32, Committed>>,
}

impl Offsets {
    /// What was committed.
    #[must_use]
    pub fn get(&self, topic: &str, partition: i32) -> Option<&Committed> {
        self.by_topic.get(topic)?.get(&partition)
    }

    /// Takes in a commit.
    pub fn put(&mut self, topic: &str, partition: i32, committed: Committed) {
        self.by_topic
            .entry(topic.to_owned())
            .or_default()
            .insert(partition, committed);
    }

    /// Forgets one.
    pub fn remove(&mut self, topic: &str, partition: i32) -> Option<Committed> {
        let partitions = self.by_topic.get_mut(topic)?;
        let gone = partitions.remove(&partition);
        if partitions.is_empty() {
            self.by_topic.remove(topic);
        }
        gone
    }

    /// All, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, i32, &Committed)> {
        self.by_topic
            .iter()
            .flat_map(|(topic, partitions)| partitions.iter().map(move |(p, c)| (topic.as_str(), *p, c)))
    }

    /// Whether nothing is committed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_topic.is_empty()
    }
}
