//! Copies that pass the caches by.
//!
//! What is copied into a buffer for the disk is not looked at again by this core. Ordinary stores would first fetch the
//! buffer's old lines, from where the device's reader has them, and push out of the cache what is needed next.

/// Lengths from which on it pays.
const WORTH: usize = 2 << 10;

/// Copies `from` to `to`, which are of one length.
pub fn copy(to: &mut [u8], from: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    if to.len() >= WORTH {
        return streamed(to, from);
    }
    to.copy_from_slice(from);
}

#[cfg(target_arch = "x86_64")]
fn streamed(to: &mut [u8], from: &[u8]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
    assert_eq!(to.len(), from.len());
    // SAFETY: any bytes are a valid `__m128i`.
    let (head, lines, tail) = unsafe { to.align_to_mut::<__m128i>() };
    let (first, rest) = from.split_at(head.len());
    let (middle, last) = rest.split_at(size_of_val(lines));
    head.copy_from_slice(first);
    tail.copy_from_slice(last);
    for (line, bytes) in lines.iter_mut().zip(middle.chunks_exact(size_of::<__m128i>())) {
        // SAFETY: the load takes 16 bytes at any address, and that many are there; the place of the store is aligned. SSE2 is
        // part of every x86-64.
        unsafe { _mm_stream_si128(line, _mm_loadu_si128(bytes.as_ptr().cast())) };
    }
    // SAFETY: SSE2, as above. Whoever is handed the buffer next finds the stores done.
    unsafe { _mm_sfence() };
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_byte_comes_to_its_place_and_no_other_is_touched(
            len in prop_oneof![0_usize..100, WORTH - 40..WORTH + 40, 0_usize..40_000],
            to_at in 0_usize..40,
            from_at in 0_usize..40,
        ) {
            let from: Vec<u8> = (0..from_at + len).map(|i| (i * 7) as u8).collect();
            let mut to = vec![0xee; to_at + len + 40];
            copy(&mut to[to_at..to_at + len], &from[from_at..]);
            prop_assert_eq!(&to[to_at..to_at + len], &from[from_at..]);
            prop_assert!(to[..to_at].iter().chain(&to[to_at + len..]).all(|b| *b == 0xee));
        }
    }
}
