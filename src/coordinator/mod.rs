//! Drivers of the coordinator shard: the metadata quorum's member, changes of the metadata, brokers, and the group
//! coordinator; [`join`] starts them.

pub mod balance;
pub mod brokers;
pub mod controller;
pub mod groups;
pub mod join;
pub mod moves;
pub mod quorum;
