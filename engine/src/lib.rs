//! One shard's storage: record batches, the shard journal, segments, caches, recovery, retention.
//!
//! Everything here runs on one thread and waits only through [`host::Host`], the seam that a
//! glommio executor ([`disk::glommio`]) and a seeded simulation ([`disk::sim`]) implement.
//! The crate knows nothing of sockets, of the Kafka request protocol or of clusters; the one thing it knows
//! of Kafka is the record batch ([`kafka_batch`]), because that is what it stores.
//!
//! Reading order: [`layout`] and [`batch`] (what is on disk) → [`journal`] (how an append becomes durable) →
//! [`log`] (one partition) → [`shard`] (all of them, with the write path and the read path) → [`recovery`].

pub mod agreed;
mod archive;
pub mod arena;
pub mod batch;
pub mod cache;
pub mod checkpoint;
pub mod checksum;
pub mod disk;
pub mod error;
pub mod host;
pub mod index;
pub mod index_cache;
pub mod journal;
pub mod kafka_batch;
pub mod layout;
pub mod log;
mod lru;
pub mod paged;
pub mod record_walk;
pub mod recovery;
pub mod retention;
pub mod salvage;
pub mod segment;
pub mod shard;
pub mod slab;
pub mod stream;
pub mod sync;
pub mod types;

pub use error::{AppendError, BatchError, ReadError, StorageError};
pub use types::{LeaderEpoch, Offset, PartitionKey, PartitionMap, ProducerEpoch, ProducerId};
