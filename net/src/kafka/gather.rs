//! Encoding without copying what is large: an answer becomes a few pieces, which go to the socket together.

use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut, buf::UninitSlice};
use kafka_protocol::protocol::buf::ByteBufMut;

/// Shortest bytes that become a piece of their own: to name it to the kernel costs about as much as to copy this.
pub const PIECE_MIN: usize = 16 << 10;

/// A buffer that notes where large bytes belong, and copies the rest.
pub(super) struct Gather<'a> {
    copied: BytesMut,
    /// What is large, in the order in which it will be written.
    large: &'a [Bytes],
    /// Behind how many copied bytes each of those met so far stands.
    places: Vec<usize>,
}

impl<'a> Gather<'a> {
    /// `large` is known by its address when it is written; what does not come in this order is copied. Of that there are about `copied`
    /// bytes.
    pub(super) fn new(large: &'a [Bytes], copied: usize) -> Self {
        Self {
            copied: BytesMut::with_capacity(copied),
            large,
            places: Vec::with_capacity(large.len()),
        }
    }

    /// All bytes so far.
    pub(super) fn len(&self) -> usize {
        let large = &self.large[..self.places.len()];
        self.copied.len() + large.iter().map(Bytes::len).sum::<usize>()
    }

    /// The first bytes, which are copied ones.
    pub(super) fn first_mut(&mut self) -> &mut [u8] {
        &mut self.copied
    }

    /// What was written, in order.
    pub(super) fn pieces(mut self) -> Vec<Bytes> {
        let mut pieces = Vec::with_capacity(2 * self.places.len() + 1);
        let mut done = 0;
        for (place, large) in self.places.into_iter().zip(self.large) {
            pieces.push(self.copied.split_to(place - done).freeze());
            pieces.push(large.clone());
            done = place;
        }
        pieces.push(self.copied.freeze());
        pieces.retain(|piece| !piece.is_empty());
        pieces
    }
}

// SAFETY: everything that hands out memory is BytesMut's own.
unsafe impl BufMut for Gather<'_> {
    fn remaining_mut(&self) -> usize {
        self.copied.remaining_mut()
    }

    unsafe fn advance_mut(&mut self, count: usize) {
        // SAFETY: the caller has filled so much of what `chunk_mut` gave, which is BytesMut's.
        unsafe { self.copied.advance_mut(count) }
    }

    fn chunk_mut(&mut self) -> &mut UninitSlice {
        self.copied.chunk_mut()
    }

    fn put_slice(&mut self, bytes: &[u8]) {
        let next = self.large.get(self.places.len());
        if next.is_some_and(|large| std::ptr::eq(&large[..], bytes)) {
            self.places.push(self.copied.len());
        } else {
            self.copied.put_slice(bytes);
        }
    }
}

/// Offsets count copied bytes: what goes back to fill a gap must not do so across large ones.
impl ByteBufMut for Gather<'_> {
    fn offset(&self) -> usize {
        self.copied.offset()
    }

    fn seek(&mut self, offset: usize) {
        self.copied.seek(offset);
    }

    fn range(&mut self, range: Range<usize>) -> &mut [u8] {
        self.copied.range(range)
    }
}

#[cfg(test)]
mod tests {
    use kafka_protocol::messages::{
        ApiKey, FetchResponse,
        fetch_response::{FetchableTopicResponse, PartitionData},
    };
    use proptest::prelude::*;

    use super::*;
    use crate::kafka::codec;

    proptest! {
        #[test]
        fn pieces_are_the_whole_and_what_is_large_is_not_copied(
            topics in prop::collection::vec(prop::collection::vec(0_usize..200, 0..5), 0..4),
            large_from in 0_usize..200,
            version in 4_i16..=18,
        ) {
            let mut fill = 0_u8;
            let mut response = FetchResponse::default();
            for sizes in topics {
                let mut topic = FetchableTopicResponse::default();
                for size in sizes {
                    fill = fill.wrapping_add(1);
                    let records = Bytes::from(vec![fill; size]);
                    topic.partitions.push(PartitionData::default().with_records(Some(records)));
                }
                response.responses.push(topic);
            }
            let records = response.responses.iter().flat_map(|t| &t.partitions);
            let large: Vec<Bytes> = records
                .filter_map(|p| p.records.clone())
                .filter(|r| !r.is_empty() && r.len() >= large_from)
                .collect();
            let pieces = codec::encode_pieces(ApiKey::Fetch, &response, version, 7, &large).expect("encodes");
            prop_assert_eq!(pieces.concat(), codec::encode(ApiKey::Fetch, &response, version, 7).expect("encodes"));
            let kept = |l: &&Bytes| pieces.iter().any(|p| std::ptr::eq(&p[..], &l[..]));
            prop_assert_eq!(large.iter().filter(kept).count(), large.len());
            prop_assert!(pieces.iter().all(|p| !p.is_empty()));
        }
    }
}
