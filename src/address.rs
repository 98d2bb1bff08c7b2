//! Addresses as people write them: `HOST:PORT`, with an IPv6 address in brackets.

use std::{
    io::{self, ErrorKind},
    thread,
    time::{Duration, Instant},
};

use thiserror::Error;

/// How long a port may be in use before that is an error.
const PATIENCE: Duration = Duration::from_secs(2);
/// Pause before it is tried again.
const AGAIN: Duration = Duration::from_millis(50);

/// What an address lacks; the text says how to write it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum AddressError {
    /// No colon, or nothing behind it.
    #[error("it has no port: write HOST:PORT, for example 10.0.0.1:9192")]
    NoPort,
    /// Nothing before the colon.
    #[error("it has no host: write HOST:PORT, for example 10.0.0.1:9192")]
    NoHost,
    /// More colons than one.
    #[error("an IPv6 address is written in brackets: [2001:db8::1]:9192")]
    NoBrackets,
    /// The port is none.
    #[error("its port is no number from 1 to 65535")]
    Port,
    /// The port is 0.
    #[error("port 0 means any port, and nobody could know which one: write one from 1 to 65535")]
    AnyPort,
}

/// Host, without brackets, and port.
///
/// # Errors
/// [`AddressError`], but for port 0.
pub fn split(address: &str) -> Result<(&str, u16), AddressError> {
    let (host, port) = match address.strip_prefix('[') {
        Some(rest) => {
            let (host, behind) = rest.split_once(']').ok_or(AddressError::NoBrackets)?;
            (host, behind.strip_prefix(':').ok_or(AddressError::NoPort)?)
        }
        None => address.rsplit_once(':').ok_or(AddressError::NoPort)?,
    };
    if host.contains(':') && !address.starts_with('[') {
        return Err(AddressError::NoBrackets);
    }
    if host.trim().is_empty() {
        return Err(AddressError::NoHost);
    }
    if port.is_empty() {
        return Err(AddressError::NoPort);
    }
    Ok((host, port.parse().map_err(|_| AddressError::Port)?))
}

/// The same of an address that others connect to.
///
/// # Errors
/// [`AddressError`].
pub fn split_told(address: &str) -> Result<(&str, u16), AddressError> {
    match split(address)? {
        (_, 0) => Err(AddressError::AnyPort),
        sound => Ok(sound),
    }
}

/// The address of a host and a port.
#[must_use]
pub fn join(host: &str, port: u16) -> String {
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

/// Binds a port that a process which was killed a moment ago may still hold: what an io_uring refers to outlives its process while the
/// kernel takes the ring apart.
///
/// # Errors
/// What the system says.
pub fn bind_patiently<T>(bind: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let until = Instant::now() + PATIENCE;
    loop {
        match bind() {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < until => thread::sleep(AGAIN),
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_host_and_a_port() {
        for (text, host, port) in [
            ("127.0.0.1:9092", "127.0.0.1", 9092),
            ("broker-1:1", "broker-1", 1),
            ("[::1]:9092", "::1", 9092),
        ] {
            assert_eq!(split_told(text), Ok((host, port)), "{text}");
            assert_eq!(join(host, port), text);
        }
        for (text, error) in [
            ("", AddressError::NoPort),
            (":9092", AddressError::NoHost),
            (" :9092", AddressError::NoHost),
            ("[]:9092", AddressError::NoHost),
            ("broker", AddressError::NoPort),
            ("broker:", AddressError::NoPort),
            ("[::1]", AddressError::NoPort),
            ("broker:0", AddressError::AnyPort),
            ("broker:x", AddressError::Port),
            ("broker:65536", AddressError::Port),
            ("::1:9092", AddressError::NoBrackets),
            ("[::1:9092", AddressError::NoBrackets),
        ] {
            assert_eq!(split_told(text), Err(error), "{text}");
        }
        assert_eq!(split("127.0.0.1:0"), Ok(("127.0.0.1", 0)));
    }
}
