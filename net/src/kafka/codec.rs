//! Requests in, responses out. The messages are the `kafka-protocol` crate's; what it trusts (array counts) is
//! checked by [`shape`](super::shape) first.

use bytes::{Bytes, BytesMut};
use kafka_protocol::{
    messages::{ApiKey, RequestHeader, RequestKind, ResponseHeader},
    protocol::{Decodable, Encodable, HeaderVersion, StrBytes, buf::ByteBufMut},
};
use thiserror::Error;

use super::{
    gather::Gather,
    newer,
    shape::{self, Shape},
    versions,
};

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

/// An answer that cannot be sent: a string is longer than its version can say, or a field is set that the version does not have.
#[derive(Debug, Error)]
#[error("an answer of {api:?} version {version} cannot be encoded: {reason}")]
pub struct EncodeError {
    /// Which API.
    pub api: ApiKey,
    /// Version asked for.
    pub version: i16,
    /// The encoder's words.
    pub reason: String,
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
    /// Elements of all its arrays.
    pub elements: usize,
    /// The body.
    pub body: RequestKind,
}

/// A frame that has the shape of a request. To decode it may take many times its memory: a structure for each of its elements.
pub struct Checked {
    api: ApiKey,
    version: i16,
    correlation_id: i32,
    client_id: Option<StrBytes>,
    frame_len: usize,
    shape: Shape,
    body: Bytes,
}

/// Checks one frame (without its length prefix).
///
/// # Errors
/// [`DecodeError`].
pub fn check(mut frame: Bytes) -> Result<Checked, DecodeError> {
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
    let header_version = api.request_header_version(newer::known(api, version));
    shape::check_header(&frame, header_version).map_err(|e| malformed("header", e.to_string()))?;
    let header = RequestHeader::decode(&mut frame, header_version).map_err(|e| malformed("header", e.to_string()))?;
    let shape = shape::check(api, version, &frame).map_err(|e| malformed(&name_of(api, version), e.to_string()))?;
    Ok(Checked {
        api,
        version,
        correlation_id,
        client_id: header.client_id,
        frame_len,
        shape,
        body: frame,
    })
}

fn malformed(what: &str, reason: String) -> DecodeError {
    DecodeError::Malformed {
        what: what.into(),
        reason,
    }
}

fn name_of(api: ApiKey, version: i16) -> String {
    format!("{api:?} v{version}")
}

impl Checked {
    /// Elements of all its arrays.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.shape.elements
    }

    /// Decodes it.
    ///
    /// # Errors
    /// [`DecodeError::Malformed`].
    pub fn decode(self) -> Result<Request, DecodeError> {
        let (api, version) = (self.api, self.version);
        let mut body = newer::request(self.body, &self.shape.topics);
        let body = RequestKind::decode(api, &mut body, newer::known(api, version))
            .map_err(|e| malformed(&name_of(api, version), e.to_string()))?;
        // Bytes behind the request are left alone, as a Kafka broker does: librdkafka 2.16 asks for the metadata of all topics
        // with three of them.
        Ok(Request {
            api,
            version,
            correlation_id: self.correlation_id,
            client_id: self.client_id,
            frame_len: self.frame_len,
            elements: self.shape.elements,
            body,
        })
    }
}

/// Encodes a response of `api` with length prefix and header.
///
/// # Errors
/// [`EncodeError`]; the connection is to be closed, as nobody else can be told.
pub fn encode<R: Encodable + HeaderVersion>(
    api: ApiKey,
    response: &R,
    version: i16,
    correlation_id: i32,
) -> Result<BytesMut, EncodeError> {
    let failed = |reason: String| EncodeError { api, version, reason };
    let known = newer::known(api, version);
    let mut out = BytesMut::with_capacity(room(response, known));
    let header_len = write(&mut out, response, known, correlation_id).map_err(failed)?;
    if known != version {
        let body = newer::response(api, version, &out[header_len..]);
        out.truncate(header_len);
        out.extend_from_slice(&body);
    }
    let length = length_of(out.len()).map_err(failed)?;
    out[..4].copy_from_slice(&length);
    Ok(out)
}

/// What a frame's prefix says.
fn length_of(with_prefix: usize) -> Result<[u8; 4], String> {
    let length = i32::try_from(with_prefix - 4).map_err(|_| format!("it has {with_prefix} bytes"))?;
    Ok(length.to_be_bytes())
}

/// As [`encode`], in pieces: `large` are bytes that the response holds, in its order, and that are not copied. For APIs that the
/// protocol crate knows in all versions served.
///
/// # Errors
/// As [`encode`].
pub fn encode_pieces<R: Encodable + HeaderVersion>(
    api: ApiKey,
    response: &R,
    version: i16,
    correlation_id: i32,
    large: &[Bytes],
) -> Result<Vec<Bytes>, EncodeError> {
    let failed = |reason: String| EncodeError { api, version, reason };
    let large_len: usize = large.iter().map(Bytes::len).sum();
    let mut out = Gather::new(large, room(response, version).saturating_sub(large_len));
    write(&mut out, response, version, correlation_id).map_err(failed)?;
    let length = length_of(out.len()).map_err(failed)?;
    out.first_mut()[..4].copy_from_slice(&length);
    Ok(out.pieces())
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
) -> Result<usize, String> {
    out.put_slice(&[0; 4]);
    ResponseHeader::default()
        .with_correlation_id(correlation_id)
        .encode(out, R::header_version(version))
        .map_err(|e| e.to_string())?;
    let header_len = out.offset();
    response.encode(out, version).map_err(|e| e.to_string())?;
    Ok(header_len)
}
