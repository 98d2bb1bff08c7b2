//! Drivers of the coordinator shard: the controller's metadata log and the group coordinator.

pub mod controller;
pub mod groups;
