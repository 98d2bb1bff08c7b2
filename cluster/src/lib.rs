//! What several nodes (or one, as a quorum of one) agree on: metadata, and consumer groups.
//!
//! Everything here is sans-IO: inputs, time and randomness come in, outputs go out. [`metadata`] holds the facts
//! and their immutable image, [`controller`] turns `(image, request)` into `(records, response)`, [`group`] is the
//! group coordinator, [`cores`] says which core of a node has what. The drivers are the node's.

pub mod controller;
pub mod cores;
pub mod group;
pub mod metadata;
pub mod peer;
pub mod raft;
pub mod replica;
pub mod simulation;
