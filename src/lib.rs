//! The Millrace broker: configuration, shards and the messages between them, one handler per Kafka API.
//!
//! [`server`] starts and stops; [`node`] is one shard; [`router`] carries work between shards; [`kafka`] serves the
//! protocol; [`coordinator`] runs on shard 0; [`peers`] connects nodes, [`replication`] keeps copies of partitions on them;
//! [`endpoints`] is what clients connect to; [`config`] is the one registry of settings; [`doctor`] looks at the host;
//! [`export`] saves a stopped broker's records as Kafka's files.

pub mod address;
pub mod admin;
pub mod config;
pub mod container;
pub mod coordinator;
pub mod cpus;
pub mod doctor;
pub mod endpoints;
pub mod export;
pub mod identity;
pub mod kafka;
pub mod listen;
pub mod node;
pub mod peers;
pub mod replication;
pub mod router;
pub mod seldom;
pub mod server;
