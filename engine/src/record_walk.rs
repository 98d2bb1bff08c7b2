//! The records of a batch, checked in pieces of any size as they come out of a decompressor: nothing of them is kept.
//!
//! ```text
//! length varint │ attributes 1 │ timestampDelta varlong │ offsetDelta varint │ keyLength varint │ key │ valueLength varint
//! │ value │ headerCount varint │ (nameLength varint │ name │ valueLength varint │ value) …
//! ```
//! Source: Kafka protocol guide, "Record". The rules are those of [`for_each_record`](crate::kafka_batch::for_each_record).

use crate::{
    error::BatchError,
    kafka_batch::{BatchInfo, Times},
};

/// What comes next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Field {
    Length,
    Attributes,
    TimestampDelta,
    OffsetDelta,
    KeyLength,
    ValueLength,
    HeaderCount,
    HeaderNameLength,
    HeaderValueLength,
}

/// A pass over the records of one batch.
#[derive(Debug)]
pub struct RecordWalk {
    base_timestamp: i64,
    /// Set if the time of every record is the broker's.
    append_time: Option<i64>,
    /// Records as stated.
    expected: i32,
    /// Records that are through.
    records: i32,
    field: Field,
    /// Bytes of a key, a value or a header to be passed over before that.
    skip: usize,
    /// Bytes left of the record.
    left: usize,
    /// A number of which not all bytes have come, and how many bits of it have.
    number: u64,
    bits: u32,
    headers: i64,
    times: Times,
}

fn invalid(reason: &'static str) -> BatchError {
    BatchError::Invalid { reason }
}

impl RecordWalk {
    /// Begins before the first record of a batch with this header.
    #[must_use]
    pub fn new(info: &BatchInfo) -> Self {
        Self {
            base_timestamp: info.base_timestamp,
            append_time: info.is_log_append_time().then_some(info.max_timestamp),
            expected: info.record_count,
            records: 0,
            field: Field::Length,
            skip: 0,
            left: 0,
            number: 0,
            bits: 0,
            headers: 0,
            times: Times::default(),
        }
    }

    /// Records that are through.
    #[must_use]
    pub fn records(&self) -> i32 {
        self.records
    }

    /// Takes the next bytes; `visit` is given the offset (less the base offset) and the timestamp of each record that begins.
    ///
    /// # Errors
    /// [`BatchError::Invalid`] at the first record that does not fit.
    pub fn push(&mut self, mut bytes: &[u8], visit: &mut impl FnMut(i32, i64)) -> Result<(), BatchError> {
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            let Some((&byte, rest)) = bytes.split_first() else {
                return Ok(());
            };
            bytes = rest;
            if self.field == Field::Length {
                if self.records == self.expected {
                    return Err(invalid("bytes follow the last record"));
                }
            } else {
                self.use_up(1)?;
            }
            if self.field == Field::Attributes {
                self.field = Field::TimestampDelta;
            } else if let Some(number) = self.number(byte)? {
                self.take(number, visit)?;
            }
        }
    }

    /// Ends after the last byte. Returns what the records say of their times.
    ///
    /// # Errors
    /// [`BatchError::Invalid`] if there are fewer records than stated.
    pub fn finish(self) -> Result<Times, BatchError> {
        let between_records = self.field == Field::Length && self.bits == 0 && self.skip == 0;
        if !between_records {
            return Err(invalid("the last record is cut short"));
        }
        if self.records < self.expected {
            return Err(invalid("there are fewer records than the batch states"));
        }
        Ok(self.times)
    }

    /// Uses up bytes of the record.
    fn use_up(&mut self, bytes: usize) -> Result<(), BatchError> {
        self.left = (self.left.checked_sub(bytes)).ok_or(invalid("a record's field is longer than the record"))?;
        Ok(())
    }

    /// Takes a byte of a zigzag number: an i64 for times, an i32 for all else.
    fn number(&mut self, byte: u8) -> Result<Option<i64>, BatchError> {
        let width = if self.field == Field::TimestampDelta { 64 } else { 32 };
        let value = u64::from(byte & 0x7f);
        if self.bits >= width || (self.bits + 7 > width && value >> (width - self.bits) != 0) {
            return Err(invalid("a number in a record is too large"));
        }
        self.number |= value << self.bits;
        self.bits += 7;
        if byte & 0x80 != 0 {
            return Ok(None);
        }
        let number = std::mem::take(&mut self.number);
        self.bits = 0;
        Ok(Some((number >> 1).cast_signed() ^ -((number & 1).cast_signed())))
    }

    /// Takes the field that was read.
    fn take(&mut self, number: i64, visit: &mut impl FnMut(i32, i64)) -> Result<(), BatchError> {
        self.field = match self.field {
            Field::Length => {
                self.left = usize::try_from(number).map_err(|_| invalid("a record's length is negative"))?;
                Field::Attributes
            }
            // One byte, which is no number.
            Field::Attributes => Field::TimestampDelta,
            Field::TimestampDelta => {
                let stated = self.base_timestamp.wrapping_add(number);
                let timestamp = self.append_time.unwrap_or(stated);
                self.times.note(timestamp);
                visit(self.records, timestamp);
                Field::OffsetDelta
            }
            Field::OffsetDelta if number != i64::from(self.records) => {
                return Err(invalid("record offsets are not consecutive"));
            }
            Field::OffsetDelta => Field::KeyLength,
            Field::KeyLength => {
                self.pass_over_nullable(number)?;
                Field::ValueLength
            }
            Field::ValueLength => {
                self.pass_over_nullable(number)?;
                Field::HeaderCount
            }
            Field::HeaderCount => {
                if number < 0 || number > self.left as i64 {
                    return Err(invalid("a record's header count is impossible"));
                }
                self.headers = number;
                self.next_header()?
            }
            Field::HeaderNameLength => {
                self.pass_over(number)?;
                Field::HeaderValueLength
            }
            Field::HeaderValueLength => {
                self.pass_over_nullable(number)?;
                self.headers -= 1;
                self.next_header()?
            }
        };
        Ok(())
    }

    fn next_header(&mut self) -> Result<Field, BatchError> {
        if self.headers > 0 {
            return Ok(Field::HeaderNameLength);
        }
        if self.left > 0 {
            return Err(invalid("a record is longer than its fields"));
        }
        self.records += 1;
        Ok(Field::Length)
    }

    fn pass_over(&mut self, length: i64) -> Result<(), BatchError> {
        let length = usize::try_from(length).map_err(|_| invalid("a record's field has a negative length"))?;
        self.use_up(length)?;
        self.skip = length;
        Ok(())
    }

    fn pass_over_nullable(&mut self, length: i64) -> Result<(), BatchError> {
        if length == -1 { Ok(()) } else { self.pass_over(length) }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::kafka_batch::{self, BATCH_HEADER_LEN, NewRecord};

    /// Walks bytes in pieces.
    fn walk(info: &BatchInfo, records: &[u8], piece: usize) -> Result<Times, BatchError> {
        let mut walk = RecordWalk::new(info);
        let mut next = 0;
        for bytes in records.chunks(piece) {
            walk.push(bytes, &mut |offset, _| {
                assert_eq!(offset, next);
                next += 1;
            })?;
        }
        walk.finish()
    }

    fn record() -> impl Strategy<Value = NewRecord> {
        let bytes = || prop::option::of(prop::collection::vec(any::<u8>(), 0..300).prop_map(Bytes::from));
        (bytes(), bytes(), -1_i64..1 << 45).prop_map(|(key, value, timestamp)| NewRecord { key, value, timestamp })
    }

    proptest! {
        #[test]
        fn pieces_say_what_the_whole_says(
            records in prop::collection::vec(record(), 1..20),
            piece in 1_usize..200,
            broken in prop::option::of((any::<prop::sample::Index>(), 1_u8..)),
            cut in 0_usize..3,
        ) {
            let batch = kafka_batch::build(&records, (-1, -1, -1));
            let (info, _) = kafka_batch::parse(&batch).expect("built");
            let mut bytes = batch[BATCH_HEADER_LEN..].to_vec();
            if let Some((at, change)) = broken {
                let at = at.index(bytes.len());
                bytes[at] = bytes[at].wrapping_add(change);
                bytes.truncate(bytes.len() - cut);
            }
            let mut times = Times::default();
            let whole = kafka_batch::for_each_record(&bytes, &info, |record| {
                times.note(record.timestamp);
                true
            });
            match walk(&info, &bytes, piece) {
                Ok(found) => {
                    prop_assert_eq!(whole, Ok(()));
                    prop_assert_eq!(found, times);
                }
                Err(_) => prop_assert!(whole.is_err()),
            }
        }
    }
}
