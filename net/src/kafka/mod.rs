//! The Kafka protocol: [`frame`] lengths and limits, [`versions`] what is served, [`shape`] counts checked before
//! anything is allocated for them, [`codec`] requests in and responses out, [`compression`] bounded unpacking.

pub mod codec;
pub mod compression;
pub mod frame;
pub mod gather;
pub mod newer;
pub mod shape;
pub mod versions;
