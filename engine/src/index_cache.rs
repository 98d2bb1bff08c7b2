//! Indexes of closed segments in memory: those used last, of all partitions of a shard together, under one budget. What is not here is
//! read from its file again.

use std::{cell::RefCell, rc::Rc};

use crate::{
    index::{IndexEntry, SegmentIndex},
    lru::Lru,
    types::{Offset, PartitionKey},
};

/// What an index takes beside its entries.
const OVERHEAD: usize = 200;

/// The cache of a shard.
pub struct IndexCache(RefCell<Lru<(PartitionKey, Offset), Rc<SegmentIndex>>>);

impl IndexCache {
    /// An empty cache of at most `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self(RefCell::new(Lru::new(limit)))
    }

    /// The index of a segment, if it is here.
    #[must_use]
    pub fn get(&self, key: PartitionKey, base: Offset) -> Option<Rc<SegmentIndex>> {
        self.0.borrow_mut().get(&(key, base)).cloned()
    }

    /// Takes in the index of a segment; those used longest ago go.
    pub fn insert(&self, key: PartitionKey, base: Offset, index: Rc<SegmentIndex>) {
        let bytes = OVERHEAD + index.len() * size_of::<IndexEntry>();
        self.0.borrow_mut().insert((key, base), index, bytes);
    }

    /// Forgets the index of a segment.
    pub fn forget(&self, key: PartitionKey, base: Offset) {
        self.0.borrow_mut().remove(&(key, base));
    }

    /// Forgets all of a partition.
    pub fn forget_all(&self, key: PartitionKey) {
        self.0
            .borrow_mut()
            .remove_range((key, Offset::MIN)..=(key, Offset::MAX));
    }
}
