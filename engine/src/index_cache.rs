//! Indexes of closed segments in memory: those used last, of all partitions of a shard together, under one budget. What is not here is
//! read from its file again.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    rc::Rc,
};

use rustc_hash::FxBuildHasher;

use crate::{
    index::{IndexEntry, SegmentIndex},
    types::{Offset, PartitionKey},
};

/// What an index takes beside its entries.
const OVERHEAD: usize = 200;

struct Held {
    index: Rc<SegmentIndex>,
    used: u64,
}

#[derive(Default)]
struct State {
    by_partition: HashMap<PartitionKey, BTreeMap<Offset, Held>, FxBuildHasher>,
    /// By when they were used.
    order: BTreeMap<u64, (PartitionKey, Offset)>,
    bytes: usize,
    clock: u64,
}

/// The cache of a shard.
pub struct IndexCache {
    state: RefCell<State>,
    limit: usize,
}

fn size(index: &SegmentIndex) -> usize {
    OVERHEAD + index.len() * size_of::<IndexEntry>()
}

impl IndexCache {
    /// An empty cache of at most `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            state: RefCell::default(),
            limit,
        }
    }

    /// The index of a segment, if it is here.
    #[must_use]
    pub fn get(&self, key: PartitionKey, base: Offset) -> Option<Rc<SegmentIndex>> {
        let mut state = self.state.borrow_mut();
        let State {
            by_partition,
            order,
            clock,
            ..
        } = &mut *state;
        let held = by_partition.get_mut(&key)?.get_mut(&base)?;
        order.remove(&held.used);
        *clock += 1;
        held.used = *clock;
        order.insert(*clock, (key, base));
        Some(Rc::clone(&held.index))
    }

    /// Takes in the index of a segment; those used longest ago go.
    pub fn insert(&self, key: PartitionKey, base: Offset, index: Rc<SegmentIndex>) {
        self.forget(key, base);
        let mut state = self.state.borrow_mut();
        state.clock += 1;
        let used = state.clock;
        state.bytes += size(&index);
        state.order.insert(used, (key, base));
        state
            .by_partition
            .entry(key)
            .or_default()
            .insert(base, Held { index, used });
        while state.bytes > self.limit
            && let Some((_, (key, base))) = state.order.pop_first()
        {
            state.take(key, base);
        }
    }

    /// Forgets the index of a segment.
    pub fn forget(&self, key: PartitionKey, base: Offset) {
        let mut state = self.state.borrow_mut();
        if let Some(held) = state.take(key, base) {
            state.order.remove(&held.used);
        }
    }

    /// Forgets all of a partition.
    pub fn forget_all(&self, key: PartitionKey) {
        let mut state = self.state.borrow_mut();
        for held in state.by_partition.remove(&key).unwrap_or_default().into_values() {
            state.order.remove(&held.used);
            state.bytes -= size(&held.index);
        }
    }

    /// Bytes held.
    #[must_use]
    pub fn held(&self) -> usize {
        self.state.borrow().bytes
    }
}

impl State {
    fn take(&mut self, key: PartitionKey, base: Offset) -> Option<Held> {
        let of_partition = self.by_partition.get_mut(&key)?;
        let held = of_partition.remove(&base)?;
        if of_partition.is_empty() {
            self.by_partition.remove(&key);
        }
        self.bytes -= size(&held.index);
        Some(held)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::layout::BLOCK;

    #[derive(Clone, Debug)]
    enum Step {
        Get(u32, i64),
        Insert(u32, i64),
        Forget(u32, i64),
        ForgetAll(u32),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0..3_u32, 0..6_i64).prop_map(|(p, b)| Step::Get(p, b)),
            4 => (0..3_u32, 0..6_i64).prop_map(|(p, b)| Step::Insert(p, b)),
            1 => (0..3_u32, 0..6_i64).prop_map(|(p, b)| Step::Forget(p, b)),
            1 => (0..3_u32).prop_map(Step::ForgetAll),
        ];
        prop::collection::vec(step, 1..200)
    }

    proptest! {
        /// Beside a list in the order of use, of as many as fit.
        #[test]
        fn those_used_last_stay(steps in steps(), fit in 0_usize..8) {
            let key = |partition| PartitionKey { topic: Uuid::from_u128(7), partition };
            let cache = IndexCache::new(fit * OVERHEAD);
            let mut model: Vec<(u32, i64)> = Vec::new();
            for step in steps {
                match step {
                    Step::Get(p, b) => {
                        let known = model.iter().position(|m| *m == (p, b));
                        prop_assert_eq!(cache.get(key(p), b).is_some(), known.is_some());
                        if let Some(at) = known {
                            let used = model.remove(at);
                            model.push(used);
                        }
                    }
                    Step::Insert(p, b) => {
                        cache.insert(key(p), b, Rc::new(SegmentIndex::new(BLOCK)));
                        model.retain(|m| *m != (p, b));
                        model.push((p, b));
                        let over = model.len().saturating_sub(fit);
                        model.drain(..over);
                    }
                    Step::Forget(p, b) => {
                        cache.forget(key(p), b);
                        model.retain(|m| *m != (p, b));
                    }
                    Step::ForgetAll(p) => {
                        cache.forget_all(key(p));
                        model.retain(|m| m.0 != p);
                    }
                }
                prop_assert_eq!(cache.held(), model.len() * OVERHEAD);
            }
        }
    }
}
