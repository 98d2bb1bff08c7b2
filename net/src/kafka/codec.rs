//! Requests in, responses out. The messages are the `kafka-protocol` crate's; what it trusts (array counts) is
//! checked by [`shape`](super::shape) first.

use bytes::{Bytes, BytesMut};
use kafka_protocol::{
    messages::{ApiKey, RequestHeader, RequestKind, ResponseHeader},
    protocol::{Decodable, Encodable, HeaderVersion, StrBytes, buf::ByteBufMut},
};
use thiserror::Error;

use super::{gather::Gather, newer, shape, versions};

/// A request that cannot be served. The connection is closed for all but `UnsupportedVersion` of ApiVersions,
/// because no response could be understood.
#[derive(Debug, Error)]
pub enum DecodeError {
    /// Key of no served API.
    #[error("API key {0} is not served")]
    UnknownApi(i16),
    /// A version outside the offered range.
    #[error("{api:?} version {version} is not served; ApiVersions says which are")]
    UnsupportedVersion {
        /// Which API.
        api: ApiKey,
        /// Version asked for.
        version: i16,
        /// To answer with.
        correlation_id: i32,
    },
    /// Shorter than it says, or otherwise not what the protocol describes.
    #[error("malformed {what}: {reason}")]
    Malformed {
        /// Header or the API's name.
        what: String,
        /// The decoder's words.
        reason: String,
    },
}

/// A decoded request.
#[derive(Debug)]
pub struct Request {
    /// Which API.
    pub api: ApiKey,
    /// Version of request and response.
    pub version: i16,
    /// To be echoed.
    pub correlation_id: i32,
    /// As the client calls itself.
    pub client_id: Option<StrBytes>,
    /// Bytes of the frame it came in.
    pub frame_len: usize,
    /// The body.
    pub body: RequestKind,
}

/// Decodes one frame (without its length prefix).
///
/// # Errors
/// [`DecodeError`].
pub fn decode(mut frame: Bytes) -> Result<Request, DecodeError> {
    let frame_len = frame.len();
    if frame_len < 8 {
        return Err(DecodeError::Malformed {
            what: "header".into(),
            reason: format!("{} bytes", frame.len()),
        });
    }
    let key = i16::from_be_bytes([frame[0], frame[1]]);
    let version = i16::from_be_bytes([frame[2], frame[3]]);
    let correlation_id = i32::from_be_bytes([frame[4], frame[5], frame[6], frame[7]]);
    let served = versions::find(key).ok_or(DecodeError::UnknownApi(key))?;
    let api = served.api;
    let lowest = if matches!(api, ApiKey::Produce) { 3 } else { served.min };
    if version < lowest || version > served.max {
        return Err(DecodeError::UnsupportedVersion {
            api,
            version,
            correlation_id,
        });
    }
    let malformed = |what: &str, reason: String| DecodeError::Malformed {
        what: what.into(),
        reason,
    };
    let header_version = api.request_header_version(newer::known(api, version));
    shape::check_header(&frame, header_version).map_err(|e| malformed("header", e.to_string()))?;
    let header = RequestHeader::decode(&mut frame, header_version).map_err(|e| malformed("header", e.to_string()))?;
    let name = || format!("{api:?} v{version}");
    let topics = shape::check(api, version, &frame).map_err(|e| malformed(&name(), e.to_string()))?;
    let mut frame = newer::request(frame, &topics);
    let body = RequestKind::decode(api, &mut frame, newer::known(api, version))
        .map_err(|e| malformed(&name(), e.to_string()))?;
    // Bytes behind the request are left alone, as a Kafka broker does: librdkafka 2.16 asks for the metadata of all topics
    // with three of them.
    Ok(Request {
        api,
        version,
        correlation_id,
        client_id: header.client_id,
        frame_len,
        body,
    })
}

/// Encodes a response of `api` with length prefix and header.
///
/// # Panics
/// If a field was set that the version does not have: a bug of the handler.
#[must_use]
pub fn encode<R: Encodable + HeaderVersion>(api: ApiKey, response: &R, version: i16, correlation_id: i32) -> BytesMut {
    let known = newer::known(api, version);
    let mut out = BytesMut::with_capacity(room(response, known));
    let header_len = write(&mut out, response, known, correlation_id);
    if known != version {
        let body = newer::response(api, version, &out[header_len..]);
        out.truncate(header_len);
        out.extend_from_slice(&body);
    }
    let length = (out.len() - 4) as i32;
    out[..4].copy_from_slice(&length.to_be_bytes());
    out
}

/// As [`encode`], in pieces: `large` are bytes that the response holds, in its order, and that are not copied. For APIs that the
/// protocol crate knows in all versions served.
///
/// # Panics
/// As [`encode`].
#[must_use]
pub fn encode_pieces<R: Encodable + HeaderVersion>(
    response: &R,
    version: i16,
    correlation_id: i32,
    large: &[Bytes],
) -> Vec<Bytes> {
    let large_len: usize = large.iter().map(Bytes::len).sum();
    let mut out = Gather::new(large, room(response, version).saturating_sub(large_len));
    write(&mut out, response, version, correlation_id);
    let length = (out.len() - 4) as i32;
    out.first_mut()[..4].copy_from_slice(&length.to_be_bytes());
    out.pieces()
}

/// What a response takes with length and header, or a little more: to grow step by step would copy a long one several times.
fn room<R: Encodable>(response: &R, version: i16) -> usize {
    16 + response.compute_size(version).unwrap_or(0)
}

/// A place for the length, header and body; the bytes before the body.
fn write<R: Encodable + HeaderVersion>(
    out: &mut impl ByteBufMut,
    response: &R,
    version: i16,
    correlation_id: i32,
) -> usize {
    out.put_slice(&[0; 4]);
    ResponseHeader::default()
        .with_correlation_id(correlation_id)
        .encode(out, R::header_version(version))
        .expect("a response header has no field that a version lacks");
    let header_len = out.offset();
    response
        .encode(out, version)
        .unwrap_or_else(|e| panic!("a handler built a response that version {version} cannot carry: {e}"));
    header_len
}
