//! Read cache: pieces of segments, read ahead of a sequential reader, under a budget of its own, so
//! that a cold reader does not push out what the tail of the log holds.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
};

use bytes::Bytes;

use crate::types::{Offset, PartitionKey};

/// Bytes of one piece: large enough for the device's sequential rate, small enough to waste little.
pub const CHUNK: u64 = 512 << 10;

/// A piece of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ChunkKey {
    /// Partition.
    pub key: PartitionKey,
    /// Segment.
    pub base: Offset,
    /// Position / [`CHUNK`].
    pub index: u64,
}

struct Cached {
    bytes: Bytes,
    used: u64,
}

/// The cache of a shard.
pub struct ReadCache {
    budget: usize,
    held: Cell<usize>,
    clock: Cell<u64>,
    /// Counts invalidations: a read that began before one must not be kept.
    version: Cell<u64>,
    chunks: RefCell<HashMap<ChunkKey, Cached>>,
    loading: RefCell<HashMap<ChunkKey, Rc<crate::sync::WaitList>>>,
}

impl ReadCache {
    /// A cache of at most `budget` bytes.
    #[must_use]
    pub fn new(budget: usize) -> Self {
        Self {
            budget,
            held: Cell::new(0),
            clock: Cell::new(0),
            version: Cell::new(0),
            chunks: RefCell::default(),
            loading: RefCell::default(),
        }
    }

    /// A cached piece that reaches up to `until` within it.
    pub fn get(&self, key: ChunkKey, until: usize) -> Option<Bytes> {
        let now = self.clock.get() + 1;
        self.clock.set(now);
        let mut chunks = self.chunks.borrow_mut();
        let cached = chunks.get_mut(&key)?;
        if cached.bytes.len() < until {
            return None;
        }
        cached.used = now;
        Some(cached.bytes.clone())
    }

    /// Marks a piece as being read; `None` if somebody reads it already, with the list to wait on.
    pub fn begin(&self, key: ChunkKey) -> Result<u64, Rc<crate::sync::WaitList>> {
        let mut loading = self.loading.borrow_mut();
        if let Some(list) = loading.get(&key) {
            return Err(Rc::clone(list));
        }
        loading.insert(key, Rc::default());
        Ok(self.version.get())
    }

    /// Whether a piece is being read.
    #[must_use]
    pub fn is_loading(&self, key: ChunkKey) -> bool {
        self.loading.borrow().contains_key(&key)
    }

    /// Ends a read; the bytes are kept if nothing was written meanwhile.
    pub fn finish(&self, key: ChunkKey, version: u64, bytes: Option<Bytes>) {
        let waiting = self.loading.borrow_mut().remove(&key);
        if let Some(bytes) = bytes
            && version == self.version.get()
            && bytes.len() <= self.budget
        {
            let used = self.clock.get();
            self.held.set(self.held.get() + bytes.len());
            let mut chunks = self.chunks.borrow_mut();
            if let Some(old) = chunks.insert(key, Cached { bytes, used }) {
                self.held.set(self.held.get() - old.bytes.len());
            }
            while self.held.get() > self.budget {
                let Some(oldest) = chunks.iter().min_by_key(|(_, c)| c.used).map(|(k, _)| *k) else {
                    break;
                };
                if let Some(gone) = chunks.remove(&oldest) {
                    self.held.set(self.held.get() - gone.bytes.len());
                }
            }
        }
        if let Some(waiting) = waiting {
            waiting.wake_all();
        }
    }

    /// Forgets the pieces of a segment that overlap `[from, to)`, because they were just written.
    pub fn invalidate(&self, key: PartitionKey, base: Offset, from: u64, to: u64) {
        self.version.set(self.version.get() + 1);
        self.retain(|k| !(k.key == key && k.base == base && k.index * CHUNK < to && (k.index + 1) * CHUNK > from));
    }

    /// Forgets a partition.
    pub fn forget(&self, key: PartitionKey) {
        self.version.set(self.version.get() + 1);
        self.retain(|k| k.key != key);
    }

    fn retain(&self, keep: impl Fn(&ChunkKey) -> bool) {
        let mut freed = 0;
        self.chunks.borrow_mut().retain(|k, c| {
            let stay = keep(k);
            if !stay {
                freed += c.bytes.len();
            }
            stay
        });
        self.held.set(self.held.get() - freed);
    }

    /// Bytes held.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.get()
    }
}
