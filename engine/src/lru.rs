//! Values in the order of their use, at most so heavy together: what the caches of segment files, of pieces and of indexes share.

use std::{collections::BTreeMap, ops::RangeBounds};

struct Entry<V> {
    value: V,
    weight: usize,
    used: u64,
}

/// Values by key. Where they would weigh more than the limit, those used longest ago go.
///
/// Nothing it does looks at all of them: with the memory of a large machine there are hundreds of thousands, and a shard that looked at each
/// would stand still for a millisecond. A range of keys can go at once, as the parts of a partition do.
pub struct Lru<K, V> {
    entries: BTreeMap<K, Entry<V>>,
    /// By when they were used last.
    order: BTreeMap<u64, K>,
    held: usize,
    limit: usize,
    clock: u64,
}

impl<K: Ord + Copy, V> Lru<K, V> {
    /// Nothing yet, and at most `limit` of weight.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            entries: BTreeMap::new(),
            order: BTreeMap::new(),
            held: 0,
            limit,
            clock: 0,
        }
    }

    /// A value, which is used now.
    pub fn get(&mut self, key: &K) -> Option<&V> {
        let entry = self.entries.get_mut(key)?;
        self.order.remove(&entry.used);
        self.clock += 1;
        entry.used = self.clock;
        self.order.insert(self.clock, *key);
        Some(&entry.value)
    }

    /// A value, without using it.
    #[must_use]
    pub fn peek(&self, key: &K) -> Option<&V> {
        self.entries.get(key).map(|entry| &entry.value)
    }

    /// Takes in a value, used now, in place of the one that the key has. What alone is heavier than the limit is not kept.
    pub fn insert(&mut self, key: K, value: V, weight: usize) {
        self.remove(&key);
        if weight > self.limit {
            return;
        }
        self.clock += 1;
        let used = self.clock;
        self.held += weight;
        self.order.insert(used, key);
        self.entries.insert(key, Entry { value, weight, used });
        while self.held > self.limit
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.take(&oldest);
        }
    }

    /// Gives up a value.
    pub fn remove(&mut self, key: &K) {
        if let Some(entry) = self.take(key) {
            self.order.remove(&entry.used);
        }
    }

    /// Gives up all values whose keys are in a range.
    pub fn remove_range(&mut self, range: impl RangeBounds<K>) {
        let gone: Vec<K> = self.entries.range(range).map(|(key, _)| *key).collect();
        for key in gone {
            self.remove(&key);
        }
    }

    /// Weight of what is held.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held
    }

    /// What stands in the order of use is the caller's.
    fn take(&mut self, key: &K) -> Option<Entry<V>> {
        let entry = self.entries.remove(key)?;
        self.held -= entry.weight;
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Get(u8),
        Peek(u8),
        Insert(u8, usize),
        Remove(u8),
        RemoveRange(u8, u8),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0..16_u8).prop_map(Step::Get),
            1 => (0..16_u8).prop_map(Step::Peek),
            4 => (0..16_u8, 0..5_usize).prop_map(|(k, w)| Step::Insert(k, w)),
            1 => (0..16_u8).prop_map(Step::Remove),
            1 => (0..16_u8, 0..16_u8).prop_map(|(a, b)| Step::RemoveRange(a.min(b), a.max(b))),
        ];
        prop::collection::vec(step, 1..200)
    }

    proptest! {
        /// Beside a list in the order of use.
        #[test]
        fn those_used_last_stay(steps in steps(), limit in 0_usize..20) {
            let mut lru = Lru::new(limit);
            // Key, value, weight; the one used last is the last.
            let mut model: Vec<(u8, usize, usize)> = Vec::new();
            for (n, step) in steps.into_iter().enumerate() {
                let at = |model: &[(u8, usize, usize)], key| model.iter().position(|m| m.0 == key);
                match step {
                    Step::Get(key) => {
                        let known = at(&model, key);
                        prop_assert_eq!(lru.get(&key).copied(), known.map(|i| model[i].1));
                        if let Some(i) = known {
                            let used = model.remove(i);
                            model.push(used);
                        }
                    }
                    Step::Peek(key) => prop_assert_eq!(lru.peek(&key).copied(), at(&model, key).map(|i| model[i].1)),
                    Step::Insert(key, weight) => {
                        lru.insert(key, n, weight);
                        model.retain(|m| m.0 != key);
                        if weight <= limit {
                            model.push((key, n, weight));
                        }
                        while model.iter().map(|m| m.2).sum::<usize>() > limit {
                            model.remove(0);
                        }
                    }
                    Step::Remove(key) => {
                        lru.remove(&key);
                        model.retain(|m| m.0 != key);
                    }
                    Step::RemoveRange(from, to) => {
                        lru.remove_range(from..to);
                        model.retain(|m| !(from..to).contains(&m.0));
                    }
                }
                prop_assert_eq!(lru.held(), model.iter().map(|m| m.2).sum::<usize>());
            }
        }
    }
}
