//! A group on disk.
//!
//! ```text
//! ┌──────────────────────┬──────────┬──────────┬───┬───────────────────────┐
//! │ GroupHeader, 128 B   │ record 0 │ record 1 │ … │ zeros to the next     │
//! │                      │ (8-byte aligned)        │ block of 4,096 bytes  │
//! └──────────────────────┴──────────┴──────────┴───┴───────────────────────┘
//! ```
//! A record is a [`BatchHeader`](crate::batch::BatchHeader), followed by its payload if its kind is `Batch`. The header
//! names incarnation, shard and position, so that stale bytes of a reused file are never taken for new, and
//! states up to where the journal was known to be flushed when the group was written: damage below that is
//! corruption, damage above it a torn tail.

// A length or count that is stored or sent must not wrap.
#![cfg_attr(not(test), warn(clippy::cast_possible_truncation))]

use rkyv::{Archive, Deserialize, Serialize, rancor, ser::writer::Buffer};

use crate::{journal::Position, layout::BLOCK, types::align_up};

/// Bytes of an encoded [`GroupHeader`].
pub const HEADER_LEN: usize = 128;
/// `"MRJ1"`, little-endian.
const MAGIC: u32 = 0x314a_524d;

#[derive(Archive, Serialize, Deserialize)]
struct Raw {
    magic: u32,
    header_crc: u32,
    incarnation: u64,
    seq: u64,
    offset: u64,
    flushed_seq: u64,
    flushed_offset: u64,
    body_len: u32,
    body_crc: u32,
    record_count: u32,
    shard: u32,
    version: u8,
    reserved: [u8; 63],
}

const _: () = assert!(size_of::<ArchivedRaw>() == HEADER_LEN);

/// What stands before a group's records.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GroupHeader {
    /// The broker's start.
    pub incarnation: u64,
    /// The journal's shard.
    pub shard: u32,
    /// Where the group stands.
    pub position: Position,
    /// Everything below was flushed when this was written.
    pub flushed: Position,
    /// Bytes of records.
    pub body_len: u32,
    /// Number of records.
    pub record_count: u32,
    /// CRC-32C of the records.
    pub body_crc: u32,
}

#[repr(C, align(8))]
struct Aligned([u8; HEADER_LEN]);

impl GroupHeader {
    /// Length of a group with so many bytes of records, in whole blocks.
    #[must_use]
    pub fn group_len(body: u64) -> u64 {
        align_up(HEADER_LEN as u64 + body, BLOCK)
    }

    /// Writes the header at the start of `out`.
    pub fn encode(&self, out: &mut [u8]) {
        let raw = Raw {
            magic: MAGIC,
            header_crc: 0,
            incarnation: self.incarnation,
            seq: self.position.seq,
            offset: self.position.offset,
            flushed_seq: self.flushed.seq,
            flushed_offset: self.flushed.offset,
            body_len: self.body_len,
            body_crc: self.body_crc,
            record_count: self.record_count,
            shard: self.shard,
            version: 1,
            reserved: [0; 63],
        };
        let mut aligned = Aligned([0; HEADER_LEN]);
        rkyv::api::high::to_bytes_in::<_, rancor::Panic>(&raw, Buffer::from(&mut aligned.0[..]))
            .expect("a fixed-size archive fits its const-asserted length");
        let crc = crc32c::crc32c(&aligned.0);
        aligned.0[4..8].copy_from_slice(&crc.to_le_bytes());
        out[..HEADER_LEN].copy_from_slice(&aligned.0);
    }

    /// Reads and checks a header; `None` for anything that is not one.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut aligned = Aligned(*bytes.first_chunk()?);
        if aligned.0[0..4] != MAGIC.to_le_bytes() {
            return None;
        }
        aligned.0[4..8].fill(0);
        if bytes[4..8] != crc32c::crc32c(&aligned.0).to_le_bytes() {
            return None;
        }
        let raw = rkyv::access::<ArchivedRaw, rancor::Error>(&aligned.0).ok()?;
        (raw.version == 1).then(|| Self {
            incarnation: raw.incarnation.to_native(),
            shard: raw.shard.to_native(),
            position: Position {
                seq: raw.seq.to_native(),
                offset: raw.offset.to_native(),
            },
            flushed: Position {
                seq: raw.flushed_seq.to_native(),
                offset: raw.flushed_offset.to_native(),
            },
            body_len: raw.body_len.to_native(),
            record_count: raw.record_count.to_native(),
            body_crc: raw.body_crc.to_native(),
        })
    }
}
