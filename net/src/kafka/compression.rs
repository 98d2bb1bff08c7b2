//! Unpacking and packing record batches, bounded. The codecs are libraries; what is ours is the bound on
//! what comes out, however small what went in.

use std::io::Read;

use bytes::{Bytes, BytesMut};
use kafka_protocol::compression::{Compressor, Gzip, Lz4, Snappy, Zstd};
use thiserror::Error;

/// Why records were not unpacked or packed.
#[derive(Debug, Error, PartialEq, Eq, Clone)]
pub enum CompressionError {
    /// The codec's complaint.
    #[error("codec {codec}: {reason}")]
    Codec {
        /// Kafka's number.
        codec: i16,
        /// Its words.
        reason: String,
    },
    /// More would come out than is allowed.
    #[error("records unpack to more than {limit} bytes")]
    TooLarge {
        /// The bound.
        limit: usize,
    },
}

fn read_bounded(codec: i16, from: impl Read, limit: usize) -> Result<Bytes, CompressionError> {
    let mut out = Vec::new();
    from.take(limit as u64 + 1)
        .read_to_end(&mut out)
        .map_err(|e| CompressionError::Codec {
            codec,
            reason: e.to_string(),
        })?;
    if out.len() > limit {
        return Err(CompressionError::TooLarge { limit });
    }
    Ok(out.into())
}

/// Unpacks with Kafka's codec number (1 gzip, 2 snappy, 3 lz4, 4 zstd) to at most `limit` bytes.
///
/// # Errors
/// [`CompressionError`].
pub fn decompress(codec: i16, packed: &[u8], limit: usize) -> Result<Bytes, CompressionError> {
    let failed = |reason: String| CompressionError::Codec { codec, reason };
    match codec {
        1 => read_bounded(codec, flate2::read::MultiGzDecoder::new(packed), limit),
        2 => snappy(packed, limit),
        3 => read_bounded(
            codec,
            lz4::Decoder::new(packed).map_err(|e| failed(e.to_string()))?,
            limit,
        ),
        4 => read_bounded(
            codec,
            zstd::stream::read::Decoder::new(packed).map_err(|e| failed(e.to_string()))?,
            limit,
        ),
        _ => Err(failed("no such codec".into())),
    }
}

/// Snappy as Kafka clients write it: raw, or in the framing of snappy-java (`\x82SNAPPY\0`, two versions, then
/// pieces of `length u32 | raw`).
fn snappy(packed: &[u8], limit: usize) -> Result<Bytes, CompressionError> {
    const JAVA: &[u8] = b"\x82SNAPPY\0";
    let piece = |raw: &[u8], room: usize| {
        let failed = |e: snap::Error| CompressionError::Codec {
            codec: 2,
            reason: e.to_string(),
        };
        // The stated length is looked at before anything is allocated for it.
        if snap::raw::decompress_len(raw).map_err(failed)? > room {
            return Err(CompressionError::TooLarge { limit });
        }
        snap::raw::Decoder::new().decompress_vec(raw).map_err(failed)
    };
    let Some(mut rest) = packed.strip_prefix(JAVA).and_then(|r| r.get(8..)) else {
        return piece(packed, limit).map(Bytes::from);
    };
    let mut out = Vec::new();
    while !rest.is_empty() {
        let torn = || CompressionError::Codec {
            codec: 2,
            reason: "a framed piece is cut short".into(),
        };
        let (len, after) = rest.split_first_chunk::<4>().ok_or_else(torn)?;
        let len = u32::from_be_bytes(*len) as usize;
        let raw = after.get(..len).ok_or_else(torn)?;
        out.extend_from_slice(&piece(raw, limit - out.len())?);
        rest = &after[len..];
    }
    Ok(out.into())
}

/// Packs with Kafka's codec number; 0 gives the bytes as they are.
///
/// # Errors
/// [`CompressionError::Codec`].
pub fn compress(codec: i16, plain: &[u8]) -> Result<Bytes, CompressionError> {
    let mut out = BytesMut::new();
    macro_rules! with {
        ($codec:ty) => {
            <$codec>::compress(&mut out, |buf| {
                bytes::BufMut::put_slice(buf, plain);
                Ok(())
            })
        };
    }
    match codec {
        0 => return Ok(Bytes::copy_from_slice(plain)),
        1 => with!(Gzip),
        2 => with!(Snappy),
        3 => with!(Lz4),
        4 => with!(Zstd),
        _ => {
            return Err(CompressionError::Codec {
                codec,
                reason: "no such codec".into(),
            });
        }
    }
    .map_err(|e| CompressionError::Codec {
        codec,
        reason: e.to_string(),
    })?;
    Ok(out.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_unpacks_and_bombs_are_refused() {
        let plain = vec![7_u8; 1 << 20];
        for codec in 1..=4 {
            let packed = compress(codec, &plain).expect("packs");
            assert!(packed.len() < plain.len() / 10, "codec {codec}");
            assert_eq!(
                decompress(codec, &packed, plain.len()).expect("unpacks"),
                plain,
                "codec {codec}"
            );
            assert_eq!(
                decompress(codec, &packed, plain.len() - 1),
                Err(CompressionError::TooLarge { limit: plain.len() - 1 }),
                "codec {codec}"
            );
            assert!(
                decompress(codec, b"garbage garbage garbage", 100).is_err(),
                "codec {codec}"
            );
        }
    }
}
