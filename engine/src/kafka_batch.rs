//! Kafka's record batch, magic 2: what a broker must know and check without opening it.
//!
//! ```text
//! baseOffset 8 │ batchLength 4 │ partitionLeaderEpoch 4 │ magic 1 │ crc 4 │ attributes 2 │ lastOffsetDelta 4
//! │ baseTimestamp 8 │ maxTimestamp 8 │ producerId 8 │ producerEpoch 2 │ baseSequence 4 │ recordCount 4 │ records …
//! ```
//! Big-endian; the CRC-32C covers everything from `attributes` on. Source: Kafka protocol guide, "Record Batch".

// A length or count that is stored or sent must not wrap.
#![cfg_attr(not(test), warn(clippy::cast_possible_truncation))]

use bytes::{Buf, Bytes};

use crate::{checksum, error::BatchError};

/// Bytes before the first record.
pub const BATCH_HEADER_LEN: usize = 61;
/// What stands for the timestamp of a record that has none.
pub const NO_TIMESTAMP: i64 = -1;
/// Where the largest timestamp stands.
const MAX_TIMESTAMP_AT: usize = 35;
/// Where the CRC stands.
const CRC_AT: usize = 17;
/// Bytes before what the CRC covers.
const CRC_FROM: usize = CRC_AT + 4;
/// Bytes before what `batchLength` counts.
const LENGTH_PREFIX: usize = 12;

const ATTR_COMPRESSION: i16 = 0x07;
const ATTR_TIMESTAMP_TYPE: i16 = 0x08;
const ATTR_TRANSACTIONAL: i16 = 0x10;
const ATTR_CONTROL: i16 = 0x20;

/// The fields of a batch header that the log acts on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchInfo {
    /// Attributes as sent.
    pub attributes: i16,
    /// Last offset less the first.
    pub last_offset_delta: i32,
    /// Timestamp that record deltas count from, ms.
    pub base_timestamp: i64,
    /// Smallest timestamp of those that are known, ms; `i64::MAX` if no record has one. Of a compressed batch that was not opened: as
    /// stated.
    pub min_timestamp: i64,
    /// Largest timestamp, ms; negative if no record has one. Of a compressed batch that was not opened: as stated.
    pub max_timestamp: i64,
    /// -1 without idempotence.
    pub producer_id: i64,
    /// -1 without idempotence.
    pub producer_epoch: i16,
    /// -1 without idempotence.
    pub base_sequence: i32,
    /// Records as stated.
    pub record_count: i32,
}

/// The times of a batch's records, ms.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Times {
    /// Smallest of those that are no [`NO_TIMESTAMP`]; `i64::MAX` if there is none.
    pub min: i64,
    /// Largest.
    pub max: i64,
}

impl Default for Times {
    /// Of no records.
    fn default() -> Self {
        Self {
            min: i64::MAX,
            max: i64::MIN,
        }
    }
}

impl Times {
    /// Takes in a record's.
    pub fn note(&mut self, timestamp: i64) {
        if timestamp != NO_TIMESTAMP {
            self.min = self.min.min(timestamp);
        }
        self.max = self.max.max(timestamp);
    }
}

impl BatchInfo {
    /// What is known of the records' times.
    #[must_use]
    pub fn times(&self) -> Times {
        Times {
            min: self.min_timestamp,
            max: self.max_timestamp,
        }
    }

    /// The same with what the records themselves say of their times.
    #[must_use]
    pub fn with_times(self, times: Times) -> Self {
        Self {
            min_timestamp: times.min,
            max_timestamp: times.max,
            ..self
        }
    }

    /// Codec number: 0 none, 1 gzip, 2 snappy, 3 lz4, 4 zstd.
    #[must_use]
    pub fn compression(&self) -> i16 {
        self.attributes & ATTR_COMPRESSION
    }

    /// Whether timestamps are the broker's (LogAppendTime).
    #[must_use]
    pub fn is_log_append_time(&self) -> bool {
        self.attributes & ATTR_TIMESTAMP_TYPE != 0
    }

    /// Whether the batch belongs to a transaction.
    #[must_use]
    pub fn is_transactional(&self) -> bool {
        self.attributes & ATTR_TRANSACTIONAL != 0
    }

    /// Whether the batch is a control batch, which only brokers write.
    #[must_use]
    pub fn is_control(&self) -> bool {
        self.attributes & ATTR_CONTROL != 0
    }
}

fn be<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], BatchError> {
    bytes
        .get(at..at + N)
        .and_then(|s| s.try_into().ok())
        .ok_or(BatchError::Truncated {
            have: bytes.len(),
            need: at + N,
        })
}

fn stated_crc(batch: &[u8]) -> Result<u32, BatchError> {
    be(batch, CRC_AT).map(u32::from_be_bytes)
}

/// CRC-32C of a whole batch whose own was checked ([`parse`]): what that one covers is not read again.
///
/// # Errors
/// [`BatchError::Truncated`] if it is shorter than a header.
pub fn crc_of_checked(batch: &[u8]) -> Result<u32, BatchError> {
    let stated = stated_crc(batch)?;
    let (first, rest) = batch.split_at(CRC_FROM);
    Ok(checksum::append(crc32c::crc32c(first), rest, stated))
}

/// The header of a batch that was checked before.
///
/// # Errors
/// [`BatchError::Truncated`] if it is shorter than a header.
pub fn header(batch: &[u8]) -> Result<BatchInfo, BatchError> {
    Ok(BatchInfo {
        attributes: i16::from_be_bytes(be(batch, 21)?),
        last_offset_delta: i32::from_be_bytes(be(batch, 23)?),
        base_timestamp: i64::from_be_bytes(be(batch, 27)?),
        min_timestamp: i64::from_be_bytes(be(batch, 27)?),
        max_timestamp: i64::from_be_bytes(be(batch, MAX_TIMESTAMP_AT)?),
        producer_id: i64::from_be_bytes(be(batch, 43)?),
        producer_epoch: i16::from_be_bytes(be(batch, 51)?),
        base_sequence: i32::from_be_bytes(be(batch, 53)?),
        record_count: i32::from_be_bytes(be(batch, 57)?),
    })
}

/// Checks one batch at the start of `bytes` and returns it with its length.
///
/// # Errors
/// Any [`BatchError`]: length, magic, CRC, or counts that contradict each other.
pub fn parse(bytes: &[u8]) -> Result<(BatchInfo, usize), BatchError> {
    // The magic is looked at first: older formats have it at the same place and other lengths.
    let magic = be::<1>(bytes, 16)?[0] as i8;
    if magic != 2 {
        return Err(BatchError::UnsupportedMagic { magic });
    }
    let stated = i32::from_be_bytes(be(bytes, 8)?);
    let total = usize::try_from(stated)
        .ok()
        .and_then(|n| n.checked_add(LENGTH_PREFIX))
        .filter(|n| *n >= BATCH_HEADER_LEN)
        .ok_or(BatchError::Invalid {
            reason: "batch length is below the header's",
        })?;
    let batch = bytes.get(..total).ok_or(BatchError::Truncated {
        have: bytes.len(),
        need: total,
    })?;
    let crc = stated_crc(batch)?;
    let actual = crc32c::crc32c(&batch[CRC_FROM..]);
    if crc != actual {
        return Err(BatchError::Crc { stated: crc, actual });
    }
    let info = header(batch)?;
    if info.record_count < 1 {
        return Err(BatchError::Invalid {
            reason: "a batch must hold at least one record",
        });
    }
    if info.last_offset_delta != info.record_count - 1 {
        return Err(BatchError::Invalid {
            reason: "last offset delta is not the record count less one",
        });
    }
    if info.compression() > 4 {
        return Err(BatchError::Invalid {
            reason: "unknown compression codec",
        });
    }
    if info.producer_id >= 0 && (info.producer_epoch < 0 || info.base_sequence < 0) {
        return Err(BatchError::Invalid {
            reason: "a producer id without epoch or sequence",
        });
    }
    if info.compression() == 0 {
        // The largest timestamp is taken from the records, as Kafka does: some producers state it wrongly.
        let mut times = Times::default();
        for_each_record(&batch[BATCH_HEADER_LEN..], &info, |r| {
            times.note(r.timestamp);
            true
        })?;
        return Ok((info.with_times(times), total));
    }
    Ok((info, total))
}

/// One record's place in its batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecordRef<'a> {
    /// Offset less the batch's base offset.
    pub offset_delta: i32,
    /// Timestamp, ms.
    pub timestamp: i64,
    /// `None` for a null key.
    pub key: Option<&'a [u8]>,
    /// `None` for a tombstone.
    pub value: Option<&'a [u8]>,
}

/// A zigzag number of at most `width` bits.
fn number(buf: &mut &[u8], width: u32) -> Result<i64, BatchError> {
    let mut value = 0_u64;
    for shift in (0..width).step_by(7) {
        let (&byte, rest) = buf.split_first().ok_or(BatchError::Invalid {
            reason: "a record ends inside a number",
        })?;
        *buf = rest;
        let bits = u64::from(byte & 0x7f);
        if shift + 7 > width && bits >> (width - shift) != 0 {
            break;
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Ok((value >> 1).cast_signed() ^ -((value & 1).cast_signed()));
        }
    }
    Err(BatchError::Invalid {
        reason: "a number in a record is too large",
    })
}

fn varint(buf: &mut &[u8]) -> Result<i64, BatchError> {
    number(buf, 32)
}

fn varlong(buf: &mut &[u8]) -> Result<i64, BatchError> {
    number(buf, 64)
}

fn take<'a>(buf: &mut &'a [u8], len: i64) -> Result<&'a [u8], BatchError> {
    let len = usize::try_from(len)
        .ok()
        .filter(|n| *n <= buf.len())
        .ok_or(BatchError::Invalid {
            reason: "a record's field is longer than the record",
        })?;
    let (head, rest) = buf.split_at(len);
    *buf = rest;
    Ok(head)
}

fn take_nullable<'a>(buf: &mut &'a [u8]) -> Result<Option<&'a [u8]>, BatchError> {
    match varint(buf)? {
        -1 => Ok(None),
        n => take(buf, n).map(Some),
    }
}

/// Walks the records of an uncompressed payload (what follows the 61 header bytes).
///
/// # Errors
/// [`BatchError::Invalid`] at the first record that does not fit.
pub fn for_each_record<'a>(
    mut records: &'a [u8],
    info: &BatchInfo,
    mut visit: impl FnMut(RecordRef<'a>) -> bool,
) -> Result<(), BatchError> {
    for expected in 0..info.record_count {
        let len = varint(&mut records)?;
        let mut body = take(&mut records, len)?;
        take(&mut body, 1)?;
        let timestamp_delta = varlong(&mut body)?;
        let offset_delta = varint(&mut body)?;
        if offset_delta != i64::from(expected) {
            return Err(BatchError::Invalid {
                reason: "record offsets are not consecutive",
            });
        }
        let key = take_nullable(&mut body)?;
        let value = take_nullable(&mut body)?;
        let headers = varint(&mut body)?;
        if headers < 0 || headers > body.len() as i64 {
            return Err(BatchError::Invalid {
                reason: "a record's header count is impossible",
            });
        }
        for _ in 0..headers {
            let name = varint(&mut body)?;
            take(&mut body, name)?;
            take_nullable(&mut body)?;
        }
        if !body.is_empty() {
            return Err(BatchError::Invalid {
                reason: "a record is longer than its fields",
            });
        }
        let timestamp = if info.is_log_append_time() {
            info.max_timestamp
        } else {
            info.base_timestamp.wrapping_add(timestamp_delta)
        };
        if !visit(RecordRef {
            offset_delta: expected,
            timestamp,
            key,
            value,
        }) {
            return Ok(());
        }
    }
    if !records.is_empty() {
        return Err(BatchError::Invalid {
            reason: "bytes follow the last record",
        });
    }
    Ok(())
}

/// Cuts a produce request's record set into its batches, each checked.
///
/// # Errors
/// The first batch's that fails.
pub fn split(mut records: Bytes) -> Result<Vec<(BatchInfo, Bytes)>, BatchError> {
    let mut batches = Vec::with_capacity(1);
    while records.has_remaining() {
        let (info, len) = parse(&records)?;
        batches.push((info, records.split_to(len)));
    }
    Ok(batches)
}

/// A record to be put into a batch of our own.
#[derive(Clone, Debug, Default)]
pub struct NewRecord {
    /// `None` for a null key.
    pub key: Option<Bytes>,
    /// `None` for a tombstone.
    pub value: Option<Bytes>,
    /// ms since 1970.
    pub timestamp: i64,
}

fn put_varint(out: &mut Vec<u8>, value: i64) {
    let mut n = ((value << 1) ^ (value >> 63)) as u64;
    while n >= 0x80 {
        out.push((n & 0x7f) as u8 | 0x80);
        n >>= 7;
    }
    out.push((n & 0x7f) as u8);
}

fn put_nullable(out: &mut Vec<u8>, bytes: Option<&Bytes>) {
    match bytes {
        None => put_varint(out, -1),
        Some(bytes) => {
            put_varint(out, bytes.len() as i64);
            out.extend_from_slice(bytes);
        }
    }
}

/// Builds an uncompressed batch; `producer` is id, epoch and first sequence (-1 each for none).
#[must_use]
pub fn build(records: &[NewRecord], producer: (i64, i16, i32)) -> Bytes {
    let base = records.first().map_or(0, |r| r.timestamp);
    let max = records.iter().map(|r| r.timestamp).max().unwrap_or(base);
    let mut out = vec![0_u8; BATCH_HEADER_LEN];
    let mut body = Vec::new();
    for (i, record) in records.iter().enumerate() {
        body.clear();
        body.push(0);
        put_varint(&mut body, record.timestamp - base);
        put_varint(&mut body, i as i64);
        put_nullable(&mut body, record.key.as_ref());
        put_nullable(&mut body, record.value.as_ref());
        put_varint(&mut body, 0);
        put_varint(&mut out, body.len() as i64);
        out.extend_from_slice(&body);
    }
    let bounded = |n: usize| i32::try_from(n).expect("a batch that a broker builds is below 2 GiB");
    let length = bounded(out.len() - LENGTH_PREFIX);
    out[8..12].copy_from_slice(&length.to_be_bytes());
    out[12..16].copy_from_slice(&(-1_i32).to_be_bytes());
    out[16] = 2;
    out[23..27].copy_from_slice(&(bounded(records.len()) - 1).to_be_bytes());
    out[27..35].copy_from_slice(&base.to_be_bytes());
    out[35..43].copy_from_slice(&max.to_be_bytes());
    out[43..51].copy_from_slice(&producer.0.to_be_bytes());
    out[51..53].copy_from_slice(&producer.1.to_be_bytes());
    out[53..57].copy_from_slice(&producer.2.to_be_bytes());
    out[57..61].copy_from_slice(&bounded(records.len()).to_be_bytes());
    seal(&mut out);
    out.into()
}

fn seal(batch: &mut [u8]) {
    let crc = crc32c::crc32c(&batch[CRC_FROM..]);
    batch[CRC_AT..CRC_FROM].copy_from_slice(&crc.to_be_bytes());
}

/// The base offset as stated.
///
/// # Errors
/// [`BatchError::Truncated`].
pub fn base_offset(batch: &[u8]) -> Result<i64, BatchError> {
    be(batch, 0).map(i64::from_be_bytes)
}

/// The batch with its largest timestamp stated as it is: `max`, from the records. Some producers state another one, or none.
///
/// # Errors
/// [`BatchError::Truncated`] if it is shorter than a header.
pub fn with_max_timestamp(batch: Bytes, max: i64) -> Result<Bytes, BatchError> {
    let stated = i64::from_be_bytes(be(&batch, MAX_TIMESTAMP_AT)?);
    if stated == max {
        return Ok(batch);
    }
    let mut out = batch.to_vec();
    out[MAX_TIMESTAMP_AT..MAX_TIMESTAMP_AT + 8].copy_from_slice(&max.to_be_bytes());
    seal(&mut out);
    Ok(out.into())
}

/// Turns a batch's timestamps into the broker's (`message.timestamp.type=LogAppendTime`): the attribute and
/// the maximum are set, which together say that every record has that time (KIP-32).
#[must_use]
pub fn with_append_time(batch: &[u8], now_ms: i64) -> Bytes {
    let mut out = batch.to_vec();
    let attributes = i16::from_be_bytes([out[21], out[22]]) | ATTR_TIMESTAMP_TYPE;
    out[21..23].copy_from_slice(&attributes.to_be_bytes());
    out[35..43].copy_from_slice(&now_ms.to_be_bytes());
    seal(&mut out);
    out.into()
}

/// Replaces the records of a batch by the same ones packed with another codec.
///
/// # Errors
/// [`BatchError::Invalid`] if a batch cannot state so many bytes.
pub fn with_records(batch: &[u8], codec: i16, records: &[u8]) -> Result<Bytes, BatchError> {
    let mut out = batch[..BATCH_HEADER_LEN].to_vec();
    out.extend_from_slice(records);
    let attributes = (i16::from_be_bytes([out[21], out[22]]) & !ATTR_COMPRESSION) | codec;
    out[21..23].copy_from_slice(&attributes.to_be_bytes());
    let length = i32::try_from(out.len() - LENGTH_PREFIX).map_err(|_| BatchError::Invalid {
        reason: "a batch has at most 2 GiB",
    })?;
    out[8..12].copy_from_slice(&length.to_be_bytes());
    seal(&mut out);
    Ok(out.into())
}
