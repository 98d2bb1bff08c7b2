//! One partition's log: what decides, without files.
//!
//! [`state`] assigns offsets and places in segments, [`epoch_cache`] knows where each leader epoch began,
//! [`producer_state`] remembers what idempotent producers wrote.

pub mod epoch_cache;
pub mod producer_state;
pub mod state;

pub use epoch_cache::EpochCache;
pub use producer_state::{IN_FLIGHT, ProducerEntry, ProducerStates, SequenceCheck};
pub use state::{Cut, LogConfig, LogState, SegmentMeta};
