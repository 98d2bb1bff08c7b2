//! CRC-32C of bytes put together from parts whose checksums are known.
//!
//! A payload's bytes are read once for the checksum that came with it. What is said of more than that, a batch with its first
//! bytes, a group of the journal with all its records, follows by arithmetic: to append `n` bytes multiplies the checksum by
//! x^(8n) modulo the polynomial (the same idea as zlib's `crc32_combine`; the `crc32c` crate's own takes longer
//! than to read 16 KiB).

/// CRC-32C's polynomial, lowest power in the highest bit.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// x^0.
const ONE: u32 = 1 << 31;
/// Bytes from which on the arithmetic takes less time than to read them.
const WORTH: usize = 2 << 10;

/// x^(8 · 2^k) for every bit `k` of a length.
const POWERS: [u32; 32] = {
    let mut powers = [0; 32];
    // x^8.
    let mut power = ONE >> 8;
    let mut k = 0;
    while k < powers.len() {
        powers[k] = power;
        power = multiply(power, power);
        k += 1;
    }
    powers
};

/// The product of two polynomials, modulo [`POLYNOMIAL`].
const fn multiply(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut bit = ONE;
    while bit != 0 {
        // All ones if the bit is set: no branch that guesses wrong half of the time.
        product ^= b & 0_u32.wrapping_sub((a & bit != 0) as u32);
        b = (b >> 1) ^ (POLYNOMIAL & 0_u32.wrapping_sub(b & 1));
        bit >>= 1;
    }
    product
}

/// The checksum of bytes with checksum `first` followed by `second`, whose own checksum is `second_crc`.
#[must_use]
pub fn append(first: u32, second: &[u8], second_crc: u32) -> u32 {
    if second.len() < WORTH {
        return crc32c::crc32c_append(first, second);
    }
    let (mut shifted, mut len) = (first, second.len());
    for power in POWERS {
        if len & 1 == 1 {
            shifted = multiply(power, shifted);
        }
        len >>= 1;
        if len == 0 {
            break;
        }
    }
    shifted ^ second_crc
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parts_give_the_checksum_of_the_whole(
            first in prop::collection::vec(any::<u8>(), 0..300),
            len in prop_oneof![0_usize..300, WORTH - 2..WORTH + 2, Just(1 << 20), 0_usize..300_000],
            seed in any::<u8>(),
        ) {
            let second: Vec<u8> = (0..len).map(|i| (i * 31) as u8 ^ seed).collect();
            let whole = [first.clone(), second.clone()].concat();
            let appended = append(crc32c::crc32c(&first), &second, crc32c::crc32c(&second));
            prop_assert_eq!(appended, crc32c::crc32c(&whole));
        }
    }
}
