//! Everything on a wire, and no broker logic.
//!
//! [`kafka`] frames, versions and codes of the Kafka protocol, without I/O; [`listener`] the glommio sockets that
//! carry them, and [`traffic`] what is to be seen of that; [`quic`] what nodes say to each other. Records are opaque bytes here.

// A length or count that is stored or sent must not wrap.
#![cfg_attr(not(test), warn(clippy::cast_possible_truncation))]

pub mod kafka;
#[cfg(feature = "glommio")]
pub mod listener;
#[cfg(feature = "glommio")]
pub mod quic;
#[cfg(feature = "glommio")]
pub mod traffic;
