//! The metadata quorum: Raft by a library ([`raft`](::raft)), under the controller's records.
//!
//! [`members`] says who votes; [`storage`] is what the library reads, and how it is written to a log; [`quorum`] drives the library: messages, time and
//! proposals in, messages, bytes to persist and a new image out. No I/O here.

pub mod members;
pub mod quorum;
pub mod storage;

pub use quorum::{Applied, Begun, Finished, Outgoing, Quorum, QuorumConfig, QuorumError, found};
pub use storage::records_in;
