//! Where the payloads of small batches live: chunks filled in the order of arrival, and used again in that order.
//!
//! A request's buffer holds more than its batches, and fresh memory costs a page fault for every 4 KiB, tens of
//! microseconds each where a hypervisor has to find the page (kernel-notes.md). So small payloads are copied side by side
//! into chunks; the tail lets batches go in about the order they came, whole chunks become free, and are filled
//! again. Chunks that are new are [`touched`] by another thread before they are needed.

use std::{cell::RefCell, collections::VecDeque};

use bytes::{Bytes, BytesMut};

use crate::sync::WaitList;

/// Bytes of a chunk.
pub const CHUNK: usize = 256 << 10;
/// Longest payload that is copied: a chunk's unused end is shorter than this.
pub const PLACED_MAX: usize = CHUNK / 16;
/// Chunks kept ready.
const READY: usize = 2;
/// Oldest used chunks looked at for one that is free again. The oldest is free first, unless something still reads it.
const LOOKS: usize = 4;

/// Free chunks that stay when small payloads come no more.
const SPARE: usize = 16;
/// Chunks given back before others have their turn.
const GIVEN_BACK_AT_ONCE: usize = 256;

/// The same memory, all of whose capacity is resident; it is empty.
#[must_use]
pub fn touched(mut memory: BytesMut) -> BytesMut {
    memory.resize(memory.capacity(), 0);
    memory.clear();
    memory
}

/// The chunks of one shard.
pub struct Arena {
    open: RefCell<BytesMut>,
    ready: RefCell<VecDeque<BytesMut>>,
    /// Handles of filled chunks, oldest first; a handle can take its chunk back once nothing else holds a part.
    filled: RefCell<VecDeque<BytesMut>>,
    /// Filled chunks remembered; the memory of one forgotten goes back to the allocator when its last part is dropped.
    filled_max: usize,
    taken: WaitList,
}

impl Arena {
    /// An arena for about `bytes` of payloads held at a time. Nothing is allocated yet.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self {
            open: RefCell::default(),
            ready: RefCell::default(),
            filled: RefCell::default(),
            // Of every chunk an end may be unused.
            filled_max: bytes / (CHUNK - PLACED_MAX) + READY + LOOKS,
            taken: WaitList::default(),
        }
    }

    /// A copy of `payload`, at most [`PLACED_MAX`] bytes.
    pub fn place(&self, payload: &[u8]) -> Bytes {
        let mut open = self.open.borrow_mut();
        if open.capacity() < payload.len() {
            let next = self.ready.borrow_mut().pop_front();
            let next = next.unwrap_or_else(|| self.free_chunk().unwrap_or_else(|| BytesMut::with_capacity(CHUNK)));
            let full = std::mem::replace(&mut *open, next);
            let mut filled = self.filled.borrow_mut();
            filled.push_back(full);
            if filled.len() > self.filled_max {
                filled.pop_front();
            }
            self.taken.wake_all();
        }
        open.extend_from_slice(payload);
        open.split().freeze()
    }

    fn free_chunk(&self) -> Option<BytesMut> {
        let mut filled = self.filled.borrow_mut();
        // The others keep their order, or the next to be free would have the longest to wait for a look.
        let free = filled
            .iter_mut()
            .take(LOOKS)
            .position(|chunk| chunk.try_reclaim(CHUNK))?;
        filled.remove(free)
    }

    /// Gives free chunks to the allocator, a few at a time, that nobody will fill soon: the tail holds large batches now, or
    /// nothing. Where small ones come, those that are free are filled before there are so many.
    pub fn give_back(&self) {
        let mut filled = self.filled.borrow_mut();
        for _ in 0..GIVEN_BACK_AT_ONCE {
            if filled.get_mut(SPARE).is_none_or(|chunk| !chunk.try_reclaim(CHUNK)) {
                return;
            }
            filled.pop_front();
        }
    }

    /// Waits until a chunk is wanted. One that is free again is made ready at once; otherwise new memory is returned,
    /// to be touched and given to [`add`](Self::add).
    pub async fn next_wanted(&self) -> BytesMut {
        loop {
            self.taken
                .wait(|| (self.ready.borrow().len() < READY).then_some(()))
                .await;
            match self.free_chunk() {
                Some(chunk) => self.ready.borrow_mut().push_back(chunk),
                None => return BytesMut::with_capacity(CHUNK),
            }
        }
    }

    /// Adds a chunk that has been touched.
    pub fn add(&self, chunk: BytesMut) {
        self.ready.borrow_mut().push_back(chunk);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_filled_again_when_their_payloads_are_gone() {
        let arena = Arena::new(4 * CHUNK);
        let payload = vec![7; PLACED_MAX];
        let mut held = VecDeque::new();
        let mut places = std::collections::HashSet::new();
        for n in 0..1000_u32 {
            let mut payload = payload.clone();
            payload[..4].copy_from_slice(&n.to_le_bytes());
            let placed = arena.place(&payload);
            places.insert(placed.as_ptr());
            held.push_back((n, placed));
            if held.len() > 40 {
                let (n, placed) = held.pop_front().expect("not empty");
                assert_eq!(
                    placed[..4],
                    n.to_le_bytes(),
                    "a chunk was filled again while it was in use"
                );
            }
        }
        // 41 payloads of a sixteenth of a chunk are held at a time: a handful of chunks, not sixty.
        assert!(places.len() < 8 * 16, "{} places", places.len());
    }

    #[test]
    fn a_tail_of_the_stated_size_needs_no_new_memory() {
        // Three of these leave the largest end of a chunk unused that there can be.
        const LENGTHS: [usize; 3] = [PLACED_MAX, PLACED_MAX - 40, PLACED_MAX / 2 + 1];
        let arena = Arena::new(64 * CHUNK);
        let mut held = VecDeque::new();
        let (mut bytes, mut made) = (0, 0);
        for n in 0..40_000 {
            let placed = arena.place(&vec![0; LENGTHS[n % LENGTHS.len()]]);
            bytes += placed.len();
            held.push_back(placed);
            while bytes > 64 * CHUNK {
                bytes -= held.pop_front().map_or(0, |gone: Bytes| gone.len());
            }
            while let Some(chunk) = futures_lite::future::block_on(futures_lite::future::poll_once(arena.next_wanted()))
            {
                arena.add(chunk);
                made += 1;
            }
            if n == 20_000 {
                made = 0;
            }
        }
        assert_eq!(
            made, 0,
            "chunks are made anew although those held are let go in their order"
        );
    }

    #[test]
    fn what_is_free_and_not_wanted_any_more_is_given_back() {
        let arena = Arena::new(600 * CHUNK);
        let held: Vec<Bytes> = (0..600 * 16).map(|_| arena.place(&[0; PLACED_MAX])).collect();
        arena.give_back();
        assert_eq!(arena.filled.borrow().len(), 600, "all are in use");
        drop(held);
        for _ in 0..600_usize.div_ceil(GIVEN_BACK_AT_ONCE) {
            arena.give_back();
        }
        assert_eq!(arena.filled.borrow().len(), SPARE);
    }

    #[test]
    fn a_payload_held_for_long_keeps_only_its_own_chunk() {
        let arena = Arena::new(2 * CHUNK);
        let kept = arena.place(b"kept");
        for _ in 0..500 {
            let _ = arena.place(&[0; PLACED_MAX]);
        }
        assert_eq!(&kept[..], b"kept");
        assert!(arena.filled.borrow().len() <= arena.filled_max);
    }
}
