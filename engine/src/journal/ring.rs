//! Where the next group goes and which files are free: pure bookkeeping.
//!
//! Invariants: `live` is ordered by sequence number and its last slot is the one being written;
//! a slot is either free or live; the head only moves forward.

use std::collections::VecDeque;

use crate::layout::BLOCK;

/// A place in the journal. Sequence numbers count uses of files and never repeat within an incarnation, so a
/// position names one group for ever, whatever file it stood in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Position {
    /// Which use of a file.
    pub seq: u64,
    /// Byte in that file.
    pub offset: u64,
}

impl Position {
    /// Before the first group.
    pub const START: Self = Self { seq: 0, offset: 0 };
}

/// Room for one group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Placement {
    /// File.
    pub slot: u32,
    /// Its position.
    pub position: Position,
}

/// The ring of files.
#[derive(Debug)]
pub struct Ring {
    slot_bytes: u64,
    free: VecDeque<u32>,
    live: VecDeque<(u64, u32)>,
    head: Position,
    /// Before it nothing is needed any more.
    tail: Position,
    slots: u64,
}

impl Ring {
    /// A ring without files.
    #[must_use]
    pub fn new(slot_bytes: u64) -> Self {
        Self {
            slot_bytes,
            free: VecDeque::new(),
            live: VecDeque::new(),
            head: Position::START,
            tail: Position::START,
            slots: 0,
        }
    }

    /// Adds a prewritten file.
    pub fn add_slot(&mut self, slot: u32) {
        self.free.push_back(slot);
        self.slots += 1;
    }

    /// Room for `len` bytes, or `None` until [`release`](Self::release) or [`add_slot`](Self::add_slot).
    pub fn place(&mut self, len: u64) -> Option<Placement> {
        assert!(
            len.is_multiple_of(BLOCK) && len <= self.slot_bytes - BLOCK,
            "a group of {len} bytes does not fit a slot of {}",
            self.slot_bytes
        );
        let fits = !self.live.is_empty() && self.head.offset + len <= self.slot_bytes;
        if !fits {
            let slot = self.free.pop_front()?;
            // The first block is the file's header.
            self.head = Position {
                seq: self.head.seq + 1,
                offset: BLOCK,
            };
            self.live.push_back((self.head.seq, slot));
            self.tail = self.tail.max(Position { seq: 1, offset: BLOCK });
        }
        let (_, slot) = *self.live.back().expect("a slot was just ensured");
        let position = self.head;
        self.head.offset += len;
        Some(Placement { slot, position })
    }

    /// Frees the files that end before `tail`. The file being written stays.
    pub fn release(&mut self, tail: Position) {
        self.tail = self.tail.max(tail);
        while self.live.len() > 1 && self.live[0].0 < tail.seq {
            let (_, slot) = self.live.pop_front().expect("length was checked");
            self.free.push_back(slot);
        }
    }

    /// Bytes of files that are not free.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        match self.live.len() as u64 {
            0 => 0,
            n => (n - 1) * self.slot_bytes + self.head.offset,
        }
    }

    /// Bytes written that are still needed.
    #[must_use]
    pub fn needed_bytes(&self) -> u64 {
        (self.head.seq - self.tail.seq) * self.slot_bytes + self.head.offset - self.tail.offset
    }

    /// Bytes of all files.
    #[must_use]
    pub fn capacity_bytes(&self) -> u64 {
        self.slots * self.slot_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_ring_gives_no_room_until_it_is_released() {
        let mut ring = Ring::new(4 * BLOCK);
        ring.add_slot(0);
        ring.add_slot(1);
        let first = ring.place(3 * BLOCK).expect("empty ring");
        let second = ring.place(2 * BLOCK).expect("second slot");
        assert_eq!((first.slot, second.slot), (0, 1));
        assert_eq!(ring.place(2 * BLOCK), None);
        ring.release(first.position);
        assert_eq!(ring.place(2 * BLOCK), None, "nothing lies before the first group");
        ring.release(second.position);
        assert_eq!((ring.needed_bytes(), ring.used_bytes()), (2 * BLOCK, 3 * BLOCK));
        let third = ring.place(2 * BLOCK).expect("slot 0 is free again");
        assert_eq!(third.slot, 0);
        assert!(third.position > second.position);
    }

    #[test]
    fn positions_never_repeat() {
        let mut ring = Ring::new(8 * BLOCK);
        ring.add_slot(0);
        ring.add_slot(1);
        let mut last = Position::START;
        for _ in 0..100 {
            let p = ring.place(3 * BLOCK).expect("released each time").position;
            assert!(p > last);
            last = p;
            ring.release(p);
        }
    }
}
