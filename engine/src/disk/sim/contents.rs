//! What a file holds, what of it is durable, and what a power cut leaves.

use std::{collections::BTreeMap, ops::Range};

use super::SimRng;
use crate::layout::BLOCK;

#[derive(Default, Clone)]
pub(super) struct Inode {
    /// What a flush has made durable.
    pub durable: Vec<u8>,
    /// The write of each of its blocks.
    durable_writes: BTreeMap<u64, u64>,
    /// What reads see.
    pub current: Vec<u8>,
    /// Blocks that no flush has covered, and the last write of each.
    pub dirty: BTreeMap<u64, u64>,
}

impl Inode {
    /// Writes, not durably.
    pub fn put(&mut self, write: u64, bytes: &[u8], position: u64) {
        put(&mut self.current, bytes, position);
        self.dirty.extend(blocks(bytes, position).map(|block| (block, write)));
    }

    /// Makes a write durable, unless a later one of its block is.
    pub fn put_durably(&mut self, write: u64, bytes: &[u8], position: u64) {
        for (block, bytes) in blocks(bytes, position).zip(bytes.chunks(BLOCK as usize)) {
            if self.durable_writes.get(&block).is_none_or(|last| *last < write) {
                put(&mut self.durable, bytes, block * BLOCK);
                self.durable_writes.insert(block, write);
            }
            if self.dirty.get(&block).is_some_and(|last| *last <= write) {
                self.dirty.remove(&block);
            }
        }
    }

    /// Makes durable what was there when a flush began. What was written meanwhile is not covered.
    pub fn flushed(&mut self, began: &Self) {
        for (block, write) in &began.dirty {
            let start = (block * BLOCK) as usize;
            let end = (start + BLOCK as usize).min(began.current.len());
            if start < end {
                self.put_durably(*write, &began.current[start..end], start as u64);
            }
        }
    }

    /// As Linux does after a failed flush: the pages are clean, the data is gone.
    pub fn lost(&mut self) {
        self.dirty.clear();
        self.current = self.durable.clone();
    }

    /// What a power cut leaves of it: each block that is not durable is there, absent or torn.
    pub fn after_power_cut<'a>(&self, submitted: impl Iterator<Item = &'a Submitted>, rng: &mut SimRng) -> Self {
        let mut bytes = self.durable.clone();
        let mut leave = |block: &[u8], position: usize| {
            let keep = kept(rng, block.len());
            if keep > 0 {
                bytes.resize(bytes.len().max(position + block.len()), 0);
                bytes[position..position + keep].copy_from_slice(&block[..keep]);
            }
        };
        for write in submitted {
            for (n, block) in write.bytes.chunks(BLOCK as usize).enumerate() {
                leave(block, write.position as usize + n * BLOCK as usize);
            }
        }
        for block in self.dirty.keys() {
            let start = (block * BLOCK) as usize;
            let end = (start + BLOCK as usize).min(self.current.len());
            if start < end {
                leave(&self.current[start..end], start);
            }
        }
        Self {
            current: bytes.clone(),
            durable: bytes,
            ..Self::default()
        }
    }
}

/// A write that the disk has been given and is not through with.
pub(super) struct Submitted {
    pub inode: u64,
    pub position: u64,
    pub bytes: Vec<u8>,
}

/// How much of a block a cut leaves.
fn kept(rng: &mut SimRng, len: usize) -> usize {
    match rng.below(4) {
        0 => 0,
        1 => (rng.below(8) as usize * 512).min(len),
        _ => len,
    }
}

fn put(bytes: &mut Vec<u8>, buf: &[u8], position: u64) {
    let at = position as usize;
    bytes.resize(bytes.len().max(at + buf.len()), 0);
    bytes[at..at + buf.len()].copy_from_slice(buf);
}

fn blocks(buf: &[u8], position: u64) -> Range<u64> {
    position / BLOCK..(position + buf.len() as u64).div_ceil(BLOCK)
}
