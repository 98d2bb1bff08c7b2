//! Read cache: pieces of segments, read ahead of a sequential reader, under a budget of its own, so
//! that a cold reader does not push out what the tail of the log holds.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    ops::RangeBounds,
    rc::Rc,
};

use bytes::Bytes;

use crate::{
    lru::Lru,
    sync::WaitList,
    types::{Offset, PartitionKey},
};

/// Bytes of one piece: large enough for the device's sequential rate, small enough to waste little.
pub const CHUNK: u64 = 512 << 10;

/// A piece of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ChunkKey {
    /// Partition.
    pub key: PartitionKey,
    /// Segment.
    pub base: Offset,
    /// Position / [`CHUNK`].
    pub index: u64,
}

/// A read of a piece.
#[derive(Default)]
struct Load {
    ended: Cell<bool>,
    /// The piece was written meanwhile: what was read must not be kept.
    stale: Cell<bool>,
    others: WaitList,
}

/// Ends a load however it ends.
struct Loading<'a> {
    cache: &'a ReadCache,
    key: ChunkKey,
    load: Rc<Load>,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        self.cache.loading.borrow_mut().remove(&self.key);
        self.load.ended.set(true);
        self.load.others.wake_all();
    }
}

/// The cache of a shard.
pub struct ReadCache {
    pieces: RefCell<Lru<ChunkKey, Bytes>>,
    loading: RefCell<HashMap<ChunkKey, Rc<Load>>>,
}

impl ReadCache {
    /// A cache of at most `budget` bytes.
    #[must_use]
    pub fn new(budget: usize) -> Self {
        Self {
            pieces: RefCell::new(Lru::new(budget)),
            loading: RefCell::default(),
        }
    }

    /// A cached piece that reaches up to `until` within it.
    pub fn get(&self, key: ChunkKey, until: usize) -> Option<Bytes> {
        let mut pieces = self.pieces.borrow_mut();
        pieces.get(&key).filter(|bytes| bytes.len() >= until).cloned()
    }

    /// The piece, up to `until` within it at least: from the cache, or by `read`, which nobody else does for it at the same time.
    ///
    /// # Errors
    /// Those of `read`.
    pub async fn load<E>(
        &self,
        key: ChunkKey,
        until: usize,
        read: impl Future<Output = Result<Bytes, E>>,
    ) -> Result<Bytes, E> {
        loop {
            if let Some(bytes) = self.get(key, until) {
                return Ok(bytes);
            }
            let other = self.loading.borrow().get(&key).cloned();
            let Some(other) = other else { break };
            // For this load, not for none: before this task runs again the next may have begun.
            other.others.wait(|| other.ended.get().then_some(())).await;
        }
        let load = Rc::new(Load::default());
        self.loading.borrow_mut().insert(key, Rc::clone(&load));
        let loading = Loading { cache: self, key, load };
        let bytes = read.await?;
        if !loading.load.stale.get() {
            self.pieces.borrow_mut().insert(key, bytes.clone(), bytes.len());
        }
        Ok(bytes)
    }

    /// Whether a piece is being read.
    #[must_use]
    pub fn is_loading(&self, key: ChunkKey) -> bool {
        self.loading.borrow().contains_key(&key)
    }

    /// Forgets the pieces of a segment that overlap `[from, to)`, because they were just written.
    pub fn invalidate(&self, key: PartitionKey, base: Offset, from: u64, to: u64) {
        let piece = |index| ChunkKey { key, base, index };
        self.remove(&(piece(from / CHUNK)..piece(to.div_ceil(CHUNK))));
    }

    /// Forgets a partition.
    pub fn forget(&self, key: PartitionKey) {
        let piece = |base, index| ChunkKey { key, base, index };
        self.remove(&(piece(Offset::MIN, 0)..=piece(Offset::MAX, u64::MAX)));
    }

    fn remove(&self, gone: &(impl RangeBounds<ChunkKey> + Clone)) {
        for (key, load) in &*self.loading.borrow() {
            load.stale.set(load.stale.get() || gone.contains(key));
        }
        self.pieces.borrow_mut().remove_range(gone.clone());
    }

    /// Bytes held.
    #[must_use]
    pub fn held(&self) -> usize {
        self.pieces.borrow().held()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        pin::{Pin, pin},
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
        task::{Context, Poll, Wake, Waker},
    };

    use uuid::Uuid;

    use super::*;

    /// Notes that its task is to run.
    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    type Loaded = Result<Bytes, Infallible>;

    fn poll(future: Pin<&mut impl Future<Output = Loaded>>, woken: &Arc<Woken>) -> Poll<Loaded> {
        woken.0.store(false, Ordering::Relaxed);
        future.poll(&mut Context::from_waker(&Waker::from(Arc::clone(woken))))
    }

    fn key() -> ChunkKey {
        ChunkKey {
            key: PartitionKey {
                topic: Uuid::from_u128(1),
                partition: 0,
            },
            base: 0,
            index: 0,
        }
    }

    /// A read that ends when it is told to.
    async fn read(open: &Cell<bool>, list: &WaitList) -> Loaded {
        list.wait(|| open.get().then_some(())).await;
        Ok(Bytes::from_static(b"bytes"))
    }

    #[test]
    fn who_waits_for_one_load_is_woken_although_the_next_has_begun() {
        let cache = ReadCache::new(1 << 20);
        let (first, second, list) = (Cell::new(false), Cell::new(false), WaitList::default());
        let woken = [(); 3].map(|()| Arc::new(Woken::default()));
        let mut a = pin!(cache.load(key(), 1, read(&first, &list)));
        let mut b = pin!(cache.load(key(), 1, async { unreachable!("the second read is kept") }));
        let mut c = pin!(cache.load(key(), 1, read(&second, &list)));
        assert!(poll(a.as_mut(), &woken[0]).is_pending() && poll(b.as_mut(), &woken[1]).is_pending());
        // What the first reads is not kept, so the next to come reads it again.
        cache.invalidate(key().key, 0, 0, 1);
        first.set(true);
        assert!(poll(a.as_mut(), &woken[0]).is_ready() && woken[1].0.load(Ordering::Relaxed));
        assert!(poll(c.as_mut(), &woken[2]).is_pending() && poll(b.as_mut(), &woken[1]).is_pending());
        second.set(true);
        assert!(poll(c.as_mut(), &woken[2]).is_ready());
        assert!(woken[1].0.load(Ordering::Relaxed), "nobody wakes it any more");
        assert!(poll(b.as_mut(), &woken[1]).is_ready());
    }

    #[test]
    fn a_load_that_is_given_up_is_done_by_another() {
        let cache = ReadCache::new(1 << 20);
        let (never, now, list) = (Cell::new(false), Cell::new(true), WaitList::default());
        let woken = [(); 2].map(|()| Arc::new(Woken::default()));
        let mut a = Box::pin(cache.load(key(), 1, read(&never, &list)));
        let mut b = pin!(cache.load(key(), 1, read(&now, &list)));
        assert!(poll(a.as_mut(), &woken[0]).is_pending() && poll(b.as_mut(), &woken[1]).is_pending());
        drop(a);
        assert!(woken[1].0.load(Ordering::Relaxed) && poll(b.as_mut(), &woken[1]).is_ready());
    }

    #[test]
    fn writes_elsewhere_do_not_keep_a_read_out() {
        let cache = ReadCache::new(1 << 20);
        let (open, list, woken) = (Cell::new(false), WaitList::default(), Arc::new(Woken::default()));
        let mut a = pin!(cache.load(key(), 1, read(&open, &list)));
        assert!(poll(a.as_mut(), &woken).is_pending());
        cache.invalidate(key().key, 0, CHUNK, 2 * CHUNK);
        open.set(true);
        assert!(poll(a.as_mut(), &woken).is_ready() && cache.get(key(), 5).is_some());
    }
}
