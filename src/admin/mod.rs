//! What the command line asks of a running cluster, over the Kafka protocol as any client would: [`client`] speaks it,
//! [`nodes`] adds, drains and removes nodes.

pub mod client;
pub mod nodes;
