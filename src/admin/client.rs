//! A blocking connection that asks one thing at a time.

use std::{
    io::{self, Read, Write},
    net::{TcpStream, ToSocketAddrs},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use kafka_protocol::{
    ResponseError,
    messages::{RequestHeader, ResponseHeader},
    protocol::{Decodable, Encodable, HeaderVersion, Request, StrBytes},
};
use thiserror::Error;

use crate::address::{self, AddressError};

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(5);
/// How long an answer may take: some wait for other nodes.
const ANSWER: Duration = Duration::from_secs(60);
/// Bytes of an answer at the most: the metadata of 200,000 partitions.
const ANSWER_MAX: usize = 64 << 20;

/// Why something asked of a cluster was not done.
#[derive(Debug, Error)]
pub enum AdminError {
    /// Not an address.
    #[error("--bootstrap {address:?}: {reason}")]
    Address {
        /// As given.
        address: String,
        /// What is wrong with it.
        reason: AddressError,
    },
    /// Nobody there.
    #[error("{address} cannot be reached: {source}; name a running broker with --bootstrap HOST:PORT")]
    Connect {
        /// Where.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the broker did not answer: {0}")]
    Io(#[from] io::Error),
    /// It does not speak as expected.
    #[error("the broker's answer is not understood: {0}")]
    Answer(String),
    /// It says no.
    #[error("{0}")]
    Refused(String),
}

impl AdminError {
    /// From an error code and the text that came with it, if it is one.
    pub fn check(code: i16, text: Option<&StrBytes>) -> Result<(), Self> {
        match ResponseError::try_from_code(code) {
            None => Ok(()),
            Some(error) => Err(Self::Refused(match text {
                Some(text) => text.to_string(),
                None => format!("{error:?}"),
            })),
        }
    }
}

/// A connection to one broker.
pub struct Client {
    stream: TcpStream,
    next_id: i32,
}

impl Client {
    /// Connects to the first address of `bootstrap` (`HOST:PORT,…`) that answers.
    ///
    /// # Errors
    /// [`AdminError::Connect`] with the last failure.
    pub fn connect(bootstrap: &str) -> Result<Self, AdminError> {
        let mut last = io::Error::from(io::ErrorKind::InvalidInput);
        for address in bootstrap.split(',').map(str::trim) {
            address::split_told(address).map_err(|reason| AdminError::Address {
                address: address.to_owned(),
                reason,
            })?;
            let found = address.to_socket_addrs().map(Iterator::collect::<Vec<_>>);
            for socket in found.unwrap_or_else(|error| {
                last = error;
                Vec::new()
            }) {
                match TcpStream::connect_timeout(&socket, CONNECT) {
                    Ok(stream) => {
                        stream.set_read_timeout(Some(ANSWER))?;
                        stream.set_nodelay(true)?;
                        return Ok(Self { stream, next_id: 1 });
                    }
                    Err(error) => last = error,
                }
            }
        }
        Err(AdminError::Connect {
            address: bootstrap.to_owned(),
            source: last,
        })
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// [`AdminError`].
    pub fn call<R: Request>(&mut self, version: i16, request: &R) -> Result<R::Response, AdminError> {
        let wrong = |e: &dyn std::fmt::Display| AdminError::Answer(e.to_string());
        let header = RequestHeader::default()
            .with_request_api_key(R::KEY)
            .with_request_api_version(version)
            .with_correlation_id(self.next_id)
            .with_client_id(Some(StrBytes::from_static_str("millrace-admin")));
        self.next_id += 1;
        let mut bytes = BytesMut::new();
        (header.encode(&mut bytes, R::header_version(version))).map_err(|e| wrong(&e))?;
        request.encode(&mut bytes, version).map_err(|e| wrong(&e))?;
        self.stream.write_all(&(bytes.len() as u32).to_be_bytes())?;
        self.stream.write_all(&bytes)?;
        let mut len = [0; 4];
        self.stream.read_exact(&mut len)?;
        let len = u32::from_be_bytes(len) as usize;
        if len > ANSWER_MAX {
            return Err(AdminError::Answer(format!("it has {len} bytes: is this a Kafka port?")));
        }
        let mut answer = vec![0; len];
        self.stream.read_exact(&mut answer)?;
        let mut answer = Bytes::from(answer);
        ResponseHeader::decode(&mut answer, R::Response::header_version(version)).map_err(|e| wrong(&e))?;
        R::Response::decode(&mut answer, version).map_err(|e| wrong(&e))
    }
}
