//! The stored batch: a fixed-size rkyv header, then the payload exactly as it arrived.
//!
//! ```text
//! ┌────────────────────┬──────────────────────────────┬─────────────┐
//! │ BatchHeader, 128 B │ payload, `payload_len` bytes │ 0 to 7 zero │   8-byte aligned, in segments and journal
//! └────────────────────┴──────────────────────────────┴─────────────┘
//! ```
//! The header carries what the engine needs without parsing the payload. The same bytes stand in the journal
//! and in the segment: the header states where in the segment the batch belongs, so replay puts it back there.

// A length or count that is stored or sent must not wrap.
#![cfg_attr(not(test), warn(clippy::cast_possible_truncation))]

use bytes::Bytes;
use rkyv::{Archive, Deserialize, Serialize, rancor, ser::writer::Buffer};
use uuid::Uuid;

use crate::{
    kafka_batch::{self, BatchInfo},
    stream,
    types::{LeaderEpoch, Offset, PartitionKey, ProducerEpoch, ProducerId, align_up},
};

/// Bytes of an encoded [`BatchHeader`].
pub const HEADER_LEN: usize = 128;
/// Alignment of a stored batch.
pub const BATCH_ALIGN: u64 = 8;
/// `"MRB1"`, little-endian.
const MAGIC: u32 = 0x3142_524d;

/// What a record of the journal (or an entry of a segment, always `Batch`) is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum RecordKind {
    /// Header and payload.
    Batch = 1,
    /// Header alone: the payload was written to the segment and flushed before this record.
    Extent = 2,
    /// The partition's log now starts at `base_offset`.
    LogStart = 3,
    /// The partition's log now ends at `base_offset`; the segment that holds what is before it ends at `segment_position`.
    Truncate = 4,
    /// The partition's log is empty and goes on at `base_offset`.
    Restart = 5,
}

/// How the payload is to be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum PayloadFormat {
    /// Kafka record batch, magic 2.
    KafkaV2 = 1,
    /// A record of the metadata log.
    Metadata = 2,
}

/// The header as it stands on disk and between nodes. Field order leaves no padding.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Raw {
    magic: u32,
    header_crc: u32,
    topic: [u8; 16],
    partition: u32,
    leader_epoch: i32,
    base_offset: i64,
    last_offset: i64,
    base_timestamp: i64,
    max_timestamp: i64,
    producer_id: i64,
    segment_base: i64,
    segment_position: u64,
    payload_len: u32,
    payload_crc: u32,
    base_sequence: i32,
    record_count: i32,
    producer_epoch: i16,
    attributes: i16,
    kind: u8,
    format: u8,
    version: u8,
    reserved: [u8; 17],
}

const _: () = assert!(size_of::<ArchivedRaw>() == HEADER_LEN);
const _: () = assert!(align_of::<ArchivedRaw>() as u64 == BATCH_ALIGN);

/// Everything the engine knows of a stored batch without its payload.
///
/// Invariants: `last_offset - base_offset + 1 == record_count` for Kafka batches; `segment_base ≤ base_offset`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchHeader {
    /// Kind of record.
    pub kind: RecordKind,
    /// Reading of the payload.
    pub format: PayloadFormat,
    /// Whose log it belongs to.
    pub key: PartitionKey,
    /// First offset.
    pub base_offset: Offset,
    /// Last offset (the same as the first for a single record).
    pub last_offset: Offset,
    /// Leadership under which it was appended.
    pub leader_epoch: LeaderEpoch,
    /// Number of records.
    pub record_count: i32,
    /// Kafka's batch attributes: compression, timestamp type, transactional, control.
    pub attributes: i16,
    /// Timestamp of the first record, ms since 1970.
    pub base_timestamp: i64,
    /// Largest timestamp, ms since 1970.
    pub max_timestamp: i64,
    /// Idempotent producer or -1.
    pub producer_id: ProducerId,
    /// Its epoch or -1.
    pub producer_epoch: ProducerEpoch,
    /// First sequence number or -1.
    pub base_sequence: i32,
    /// Bytes of payload.
    pub payload_len: u32,
    /// CRC-32C of the whole payload.
    pub payload_crc: u32,
    /// Base offset of the segment it is stored in.
    pub segment_base: Offset,
    /// Byte position of its header in that segment.
    pub segment_position: u64,
}

/// Why bytes are not a batch header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HeaderError {
    /// Nothing was written here.
    Blank,
    /// Magic, checksum or an enumeration fails.
    Damaged,
}

#[repr(C, align(8))]
struct Aligned([u8; HEADER_LEN]);

impl BatchHeader {
    /// A header for a Kafka batch that was checked ([`kafka_batch::parse`] gave `info`). Its place in the log is decided later.
    ///
    /// # Panics
    /// If the payload is none that was checked: a bug of ours.
    #[must_use]
    pub fn for_kafka(key: PartitionKey, info: &BatchInfo, payload: &[u8]) -> Self {
        Self {
            kind: RecordKind::Batch,
            format: PayloadFormat::KafkaV2,
            key,
            base_offset: 0,
            last_offset: i64::from(info.last_offset_delta),
            leader_epoch: 0,
            record_count: info.record_count,
            attributes: info.attributes,
            base_timestamp: info.base_timestamp,
            max_timestamp: info.max_timestamp,
            producer_id: info.producer_id,
            producer_epoch: info.producer_epoch,
            base_sequence: info.base_sequence,
            payload_len: u32::try_from(payload.len()).expect("a request's frame is below 2 GiB"),
            payload_crc: kafka_batch::crc_of_checked(payload).expect("a batch that was checked has a header"),
            segment_base: 0,
            segment_position: 0,
        }
    }

    /// A record of the journal that is no batch.
    #[must_use]
    pub fn marker(kind: RecordKind, key: PartitionKey, offset: Offset) -> Self {
        Self {
            kind,
            format: PayloadFormat::Metadata,
            key,
            base_offset: offset,
            last_offset: offset,
            leader_epoch: 0,
            record_count: 0,
            attributes: 0,
            base_timestamp: 0,
            max_timestamp: 0,
            producer_id: -1,
            producer_epoch: -1,
            base_sequence: -1,
            payload_len: 0,
            payload_crc: 0,
            segment_base: 0,
            segment_position: 0,
        }
    }

    /// Bytes that header and payload take in a segment.
    #[must_use]
    pub fn stored_len(&self) -> u64 {
        align_up(HEADER_LEN as u64 + u64::from(self.payload_len), BATCH_ALIGN)
    }

    /// Bytes that the record takes in the journal.
    #[must_use]
    pub fn journal_len(&self) -> u64 {
        match self.kind {
            RecordKind::Batch => self.stored_len(),
            RecordKind::Extent | RecordKind::LogStart | RecordKind::Truncate | RecordKind::Restart => HEADER_LEN as u64,
        }
    }

    /// Position behind the batch in its segment.
    #[must_use]
    pub fn segment_end(&self) -> u64 {
        self.segment_position + self.stored_len()
    }

    /// Writes the 128 bytes, checksum included.
    pub fn encode(&self, out: &mut [u8; HEADER_LEN]) {
        let raw = Raw {
            magic: MAGIC,
            header_crc: 0,
            topic: *self.key.topic.as_bytes(),
            partition: self.key.partition,
            leader_epoch: self.leader_epoch,
            base_offset: self.base_offset,
            last_offset: self.last_offset,
            base_timestamp: self.base_timestamp,
            max_timestamp: self.max_timestamp,
            producer_id: self.producer_id,
            segment_base: self.segment_base,
            segment_position: self.segment_position,
            payload_len: self.payload_len,
            payload_crc: self.payload_crc,
            base_sequence: self.base_sequence,
            record_count: self.record_count,
            producer_epoch: self.producer_epoch,
            attributes: self.attributes,
            kind: self.kind as u8,
            format: self.format as u8,
            version: 1,
            reserved: [0; 17],
        };
        let mut aligned = Aligned([0; HEADER_LEN]);
        rkyv::api::high::to_bytes_in::<_, rancor::Panic>(&raw, Buffer::from(&mut aligned.0[..]))
            .expect("a fixed-size archive fits its const-asserted length");
        let crc = crc32c::crc32c(&aligned.0);
        aligned.0[4..8].copy_from_slice(&crc.to_le_bytes());
        *out = aligned.0;
    }

    /// Reads and checks 128 bytes that came from a disk or a peer.
    ///
    /// # Errors
    /// [`HeaderError::Blank`] where the magic is zero, [`HeaderError::Damaged`] for anything else that fails.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, HeaderError> {
        let mut aligned = Aligned(*bytes);
        if aligned.0[0..4] == [0; 4] {
            return Err(HeaderError::Blank);
        }
        aligned.0[4..8].fill(0);
        let crc = crc32c::crc32c(&aligned.0);
        if bytes[4..8] != crc.to_le_bytes() {
            return Err(HeaderError::Damaged);
        }
        let raw = rkyv::access::<ArchivedRaw, rancor::Error>(&aligned.0).map_err(|_| HeaderError::Damaged)?;
        if raw.magic != MAGIC || raw.version != 1 {
            return Err(HeaderError::Damaged);
        }
        Ok(Self {
            kind: match raw.kind {
                1 => RecordKind::Batch,
                2 => RecordKind::Extent,
                3 => RecordKind::LogStart,
                4 => RecordKind::Truncate,
                5 => RecordKind::Restart,
                _ => return Err(HeaderError::Damaged),
            },
            format: match raw.format {
                1 => PayloadFormat::KafkaV2,
                2 => PayloadFormat::Metadata,
                _ => return Err(HeaderError::Damaged),
            },
            key: PartitionKey {
                topic: Uuid::from_bytes(raw.topic),
                partition: raw.partition.to_native(),
            },
            base_offset: raw.base_offset.to_native(),
            last_offset: raw.last_offset.to_native(),
            leader_epoch: raw.leader_epoch.to_native(),
            record_count: raw.record_count.to_native(),
            attributes: raw.attributes.to_native(),
            base_timestamp: raw.base_timestamp.to_native(),
            max_timestamp: raw.max_timestamp.to_native(),
            producer_id: raw.producer_id.to_native(),
            producer_epoch: raw.producer_epoch.to_native(),
            base_sequence: raw.base_sequence.to_native(),
            payload_len: raw.payload_len.to_native(),
            payload_crc: raw.payload_crc.to_native(),
            segment_base: raw.segment_base.to_native(),
            segment_position: raw.segment_position.to_native(),
        })
    }
}

/// A batch in memory.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Where it is and what it holds.
    pub header: BatchHeader,
    /// The bytes as they arrived.
    pub payload: Bytes,
}

impl Batch {
    /// Writes the part that begins at `from` of header, payload and padding, [`BatchHeader::stored_len`] bytes in all.
    pub fn encode_part(&self, from: usize, mut out: &mut [u8]) {
        let mut head = [0; HEADER_LEN];
        if from < HEADER_LEN {
            BatchHeader {
                kind: RecordKind::Batch,
                ..self.header
            }
            .encode(&mut head);
        }
        let mut at = from;
        for (start, bytes) in [(0, &head[..]), (HEADER_LEN, &self.payload[..])] {
            let part = bytes.get(at.saturating_sub(start)..).unwrap_or_default();
            let (now, later) = out.split_at_mut(part.len().min(out.len()));
            stream::copy(now, &part[..now.len()]);
            at += now.len();
            out = later;
        }
        out.fill(0);
    }

    /// Appends the payload as a fetch answers it: base offset and leader epoch of a Kafka batch stand outside
    /// its own CRC and are patched here, nothing else is touched.
    pub fn write_served(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&self.payload);
        if self.header.format == PayloadFormat::KafkaV2 {
            out[start..start + 8].copy_from_slice(&self.header.base_offset.to_be_bytes());
            out[start + 12..start + 16].copy_from_slice(&self.header.leader_epoch.to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parts_make_up_the_whole(len in 0_usize..600, cuts in prop::collection::vec(0_usize..800, 0..6)) {
            let payload: Bytes = (0..len).map(|i| i as u8 | 1).collect();
            let key = PartitionKey { topic: uuid::Uuid::from_u128(3), partition: 9 };
            let mut header = BatchHeader::marker(RecordKind::Batch, key, 5);
            header.payload_len = len as u32;
            let batch = Batch { header, payload };
            // What is there before does not show.
            let mut whole = vec![0xee; header.stored_len() as usize];
            batch.encode_part(0, &mut whole);
            prop_assert_eq!(&whole[HEADER_LEN..HEADER_LEN + len], &batch.payload[..]);
            prop_assert!(whole[HEADER_LEN + len..].iter().all(|b| *b == 0));
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(whole.len())).chain([0, whole.len()]).collect();
            cuts.sort_unstable();
            let mut parts = vec![0xee; whole.len()];
            for cut in cuts.windows(2) {
                batch.encode_part(cut[0], &mut parts[cut[0]..cut[1]]);
            }
            prop_assert_eq!(parts, whole);
        }
    }
}
