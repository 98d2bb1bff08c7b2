//! Unpacking and packing record batches, bounded. The codecs are libraries; what is ours is the bound on
//! what comes out, however small what went in.

use std::{
    cell::RefCell,
    fmt::Display,
    io::{self, Read, Write},
};

use bytes::{Bytes, BytesMut};
use kafka_protocol::compression::{Compressor, Snappy};
use thiserror::Error;
use zstd::stream::raw::{InBuffer, Operation, OutBuffer};

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

impl CompressionError {
    fn codec(codec: i16, reason: impl Display) -> Self {
        Self::Codec {
            codec,
            reason: reason.to_string(),
        }
    }
}

/// Bytes unpacked at once, where the codec allows it.
const PIECE: usize = 64 << 10;
/// Memory for one piece of snappy, which comes out as a whole, that is kept for the next batch.
const KEPT: usize = 1 << 20;

/// Unpacks batches one after the other, in memory that is used again.
#[derive(Default)]
pub struct Unpacker {
    out: Vec<u8>,
    zstd: Option<zstd::stream::raw::Decoder<'static>>,
    snappy: snap::raw::Decoder,
}

/// A batch that is being unpacked.
pub struct Unpacking<'a> {
    codec: i16,
    source: Source<'a>,
    out: &'a mut Vec<u8>,
    left: usize,
    limit: usize,
}

enum Source<'a> {
    Gzip(Box<flate2::bufread::MultiGzDecoder<&'a [u8]>>),
    /// `None` behind the end.
    Lz4(Option<lz4::Decoder<&'a [u8]>>),
    Zstd {
        decoder: &'a mut zstd::stream::raw::Decoder<'static>,
        packed: &'a [u8],
        /// It has come to a frame's end.
        whole: bool,
    },
    /// In the framing of snappy-java (`\x82SNAPPY\0`, two versions, then pieces of `length u32 | raw`), or one raw piece.
    Snappy {
        decoder: &'a mut snap::raw::Decoder,
        packed: &'a [u8],
        framed: bool,
    },
}

impl Unpacker {
    /// Begins to unpack with Kafka's codec number (1 gzip, 2 snappy, 3 lz4, 4 zstd) to at most `limit` bytes.
    ///
    /// # Errors
    /// [`CompressionError::Codec`].
    pub fn begin<'a>(
        &'a mut self,
        codec: i16,
        packed: &'a [u8],
        limit: usize,
    ) -> Result<Unpacking<'a>, CompressionError> {
        const JAVA: &[u8] = b"\x82SNAPPY\0";
        let failed = |e: io::Error| CompressionError::codec(codec, e);
        let source = match codec {
            1 => Source::Gzip(Box::new(flate2::bufread::MultiGzDecoder::new(packed))),
            2 => {
                let rest = packed.strip_prefix(JAVA).and_then(|r| r.get(8..));
                Source::Snappy {
                    decoder: &mut self.snappy,
                    packed: rest.unwrap_or(packed),
                    framed: rest.is_some(),
                }
            }
            3 => Source::Lz4(Some(lz4::Decoder::new(packed).map_err(failed)?)),
            4 => {
                let decoder = match &mut self.zstd {
                    Some(used) => {
                        used.reinit().map_err(failed)?;
                        used
                    }
                    none => none.insert(zstd::stream::raw::Decoder::new().map_err(failed)?),
                };
                Source::Zstd {
                    decoder,
                    packed,
                    whole: false,
                }
            }
            _ => return Err(CompressionError::codec(codec, "no such codec")),
        };
        Ok(Unpacking {
            codec,
            source,
            out: &mut self.out,
            left: limit,
            limit,
        })
    }
}

impl Unpacking<'_> {
    /// The next bytes, many of them where there are; `None` behind the last.
    ///
    /// # Errors
    /// [`CompressionError`].
    pub fn next_piece(&mut self) -> Result<Option<&[u8]>, CompressionError> {
        let failed = |e: io::Error| CompressionError::codec(self.codec, e);
        let too_large = CompressionError::TooLarge { limit: self.limit };
        if !matches!(self.source, Source::Snappy { .. }) {
            self.out.resize(PIECE, 0);
        }
        let unpacked = match &mut self.source {
            Source::Gzip(reader) => read_some(reader, self.out).map_err(failed)?,
            Source::Lz4(reader) => unpack_lz4(reader, self.out).map_err(failed)?,
            Source::Zstd { decoder, packed, whole } => unpack_zstd(decoder, packed, whole, self.out).map_err(failed)?,
            Source::Snappy { packed: [], .. } => 0,
            Source::Snappy {
                decoder,
                packed,
                framed,
            } => {
                let raw = next_of_snappy(packed, *framed)
                    .ok_or_else(|| CompressionError::codec(2, "a framed piece is cut short"))?;
                // The stated length is looked at before memory is taken for it.
                let len = snap::raw::decompress_len(raw).map_err(|e| CompressionError::codec(2, e))?;
                if len > self.left {
                    return Err(too_large);
                }
                if self.out.len() < len || self.out.len() > KEPT.max(len) {
                    *self.out = vec![0; len.max(PIECE)];
                }
                let unpacked = decoder
                    .decompress(raw, self.out)
                    .map_err(|e| CompressionError::codec(2, e))?;
                if unpacked == 0 {
                    return self.next_piece();
                }
                unpacked
            }
        };
        self.left = self.left.checked_sub(unpacked).ok_or(too_large)?;
        Ok((unpacked > 0).then(|| &self.out[..unpacked]))
    }
}

fn read_some(reader: &mut impl Read, out: &mut [u8]) -> io::Result<usize> {
    loop {
        match reader.read(out) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}

fn unpack_lz4(reader: &mut Option<lz4::Decoder<&[u8]>>, out: &mut [u8]) -> io::Result<usize> {
    let Some(decoder) = reader else { return Ok(0) };
    let unpacked = read_some(decoder, out)?;
    if unpacked == 0
        && let Some(decoder) = reader.take()
    {
        // It takes the end of what is packed for the frame's end, unless it is asked.
        decoder.finish().1?;
    }
    Ok(unpacked)
}

/// Fills `out`, or comes to the end of what is packed.
fn unpack_zstd(
    decoder: &mut zstd::stream::raw::Decoder<'static>,
    packed: &mut &[u8],
    whole: &mut bool,
    out: &mut [u8],
) -> io::Result<usize> {
    let mut unpacked = 0;
    while unpacked < out.len() {
        if packed.is_empty() && *whole {
            break;
        }
        let mut from = InBuffer::around(packed);
        let mut to = OutBuffer::around(&mut out[unpacked..]);
        let hint = decoder.run(&mut from, &mut to)?;
        let (read, wrote) = (from.pos(), to.pos());
        *packed = &packed[read..];
        *whole = hint == 0;
        unpacked += wrote;
        if read == 0 && wrote == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "incomplete frame"));
        }
    }
    Ok(unpacked)
}

/// The next raw piece; `None` if it is cut short.
fn next_of_snappy<'a>(packed: &mut &'a [u8], framed: bool) -> Option<&'a [u8]> {
    if !framed {
        return Some(std::mem::take(packed));
    }
    let (len, rest) = packed.split_first_chunk::<4>()?;
    let (raw, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    *packed = rest;
    Some(raw)
}

/// Unpackers of a shard that are not in use; several batches may be under way.
#[derive(Default)]
pub struct Unpackers(RefCell<Vec<Unpacker>>);

/// Unpackers kept.
const UNPACKERS_KEPT: usize = 4;

impl Unpackers {
    /// One for a batch.
    #[must_use]
    pub fn take(&self) -> Unpacker {
        self.0.borrow_mut().pop().unwrap_or_default()
    }

    /// Gives it back.
    pub fn give_back(&self, unpacker: Unpacker) {
        let mut kept = self.0.borrow_mut();
        if kept.len() < UNPACKERS_KEPT {
            kept.push(unpacker);
        }
    }
}

/// Unpacks all of a batch, as [`Unpacker::begin`].
///
/// # Errors
/// [`CompressionError`].
pub fn decompress(codec: i16, packed: &[u8], limit: usize) -> Result<Bytes, CompressionError> {
    let mut unpacker = Unpacker::default();
    let mut pieces = unpacker.begin(codec, packed, limit)?;
    let mut out = BytesMut::new();
    while let Some(piece) = pieces.next_piece()? {
        out.extend_from_slice(piece);
    }
    Ok(out.freeze())
}

/// How hard to pack, in Kafka's numbers: 1 to 9 or −1 for gzip, 1 to 17 for lz4, −131,072 to 22 for zstd. Snappy has none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Level(pub i32);

impl Level {
    /// For codecs without levels.
    pub const DEFAULT: Self = Self(0);

    fn of_gzip(self) -> flate2::Compression {
        u32::try_from(self.0).map_or_else(|_| flate2::Compression::default(), flate2::Compression::new)
    }

    /// Kafka's default, 9, is its fast compressor; any other its high one. The library has the fast one below 3, and nothing beyond 12.
    fn of_lz4(self) -> u32 {
        match self.0 {
            9 => 0,
            level => level.clamp(3, 12) as u32,
        }
    }

    /// Levels from 20 on have tables of the size of their input, some hundred MiB for the largest batches.
    fn of_zstd(self, plain: usize) -> i32 {
        if plain > ULTRA_MAX { self.0.min(19) } else { self.0 }
    }
}

/// Bytes up to which zstd may use its levels from 20 on.
const ULTRA_MAX: usize = 8 << 20;

/// Packs with Kafka's codec number; 0 gives the bytes as they are.
///
/// # Errors
/// [`CompressionError::Codec`].
pub fn compress(codec: i16, level: Level, plain: &[u8]) -> Result<Bytes, CompressionError> {
    let fail = |e: io::Error| CompressionError::codec(codec, e);
    match codec {
        0 => Ok(Bytes::copy_from_slice(plain)),
        1 => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), level.of_gzip());
            encoder.write_all(plain).map_err(fail)?;
            encoder.finish().map(Bytes::from).map_err(fail)
        }
        2 => {
            let mut out = BytesMut::new();
            let put = |buf: &mut BytesMut| {
                buf.extend_from_slice(plain);
                Ok(())
            };
            Snappy::compress(&mut out, put).map_err(|e| CompressionError::codec(codec, e))?;
            Ok(out.freeze())
        }
        3 => {
            let mut encoder = lz4::EncoderBuilder::new()
                .level(level.of_lz4())
                // Kafka's clients read no others.
                .block_mode(lz4::BlockMode::Independent)
                .build(Vec::new())
                .map_err(fail)?;
            encoder.write_all(plain).map_err(fail)?;
            let (out, finished) = encoder.finish();
            finished.map_err(fail)?;
            Ok(out.into())
        }
        4 => zstd::bulk::compress(plain, level.of_zstd(plain.len()))
            .map(Bytes::from)
            .map_err(fail),
        _ => Err(CompressionError::codec(codec, "no such codec")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kafka's, by codec.
    const DEFAULTS: [Level; 5] = [Level::DEFAULT, Level(-1), Level::DEFAULT, Level(9), Level(3)];

    #[test]
    fn levels_trade_size_for_time() {
        let plain: Vec<u8> = (0..60_000_u32)
            .flat_map(|n| (n % 977 * (n % 13)).to_be_bytes())
            .collect();
        let size = |codec, level| {
            let packed = compress(codec, Level(level), &plain).expect("packs");
            assert!(
                decompress(codec, &packed, plain.len()).expect("unpacks") == plain,
                "codec {codec}, level {level}"
            );
            packed.len()
        };
        assert!(size(1, 1) > size(1, 9));
        assert_eq!(size(1, -1), size(1, 6));
        assert!(size(3, 9) > size(3, 12), "9 is lz4's fast one");
        assert_eq!(size(3, 12), size(3, 17));
        size(3, 1);
        assert!(size(4, -131_072) > size(4, 3));
        assert!(size(4, 3) > size(4, 22));
        assert_eq!(Level(22).of_zstd(ULTRA_MAX), 22);
        assert_eq!(Level(22).of_zstd(ULTRA_MAX + 1), 19);
        assert_eq!(Level(-5).of_zstd(ULTRA_MAX + 1), -5);
    }

    #[test]
    fn what_is_packed_unpacks_and_bombs_are_refused() {
        let plain = vec![7_u8; 1 << 20];
        for codec in 1..=4 {
            let packed = compress(codec, DEFAULTS[codec as usize], &plain).expect("packs");
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
            for cut in [1, packed.len() / 2, packed.len() - 1] {
                let short = decompress(codec, &packed[..cut], plain.len());
                assert!(short.is_err(), "codec {codec} unpacks {cut} bytes of {}", packed.len());
            }
        }
    }

    #[test]
    fn an_unpacker_is_used_again_whatever_came_before() {
        let mut unpacker = Unpacker::default();
        let plain: Vec<u8> = (0..300_000_u32).flat_map(|n| (n / 7).to_be_bytes()).collect();
        for _ in 0..3 {
            for codec in 1..=4 {
                for len in [0, 1, PIECE - 1, PIECE, PIECE + 1, plain.len()] {
                    let packed = compress(codec, DEFAULTS[codec as usize], &plain[..len]).expect("packs");
                    // One that is given up half-way.
                    let half = unpacker.begin(codec, &packed[..packed.len() / 2], plain.len());
                    _ = half.map(|mut h| h.next_piece().map(|p| p.map(<[u8]>::len)));
                    let mut pieces = unpacker.begin(codec, &packed, len).expect("begins");
                    let mut out = Vec::new();
                    while let Some(piece) = pieces.next_piece().expect("unpacks") {
                        out.extend_from_slice(piece);
                    }
                    assert!(out == plain[..len], "codec {codec}, {len} bytes");
                }
            }
        }
    }
}
