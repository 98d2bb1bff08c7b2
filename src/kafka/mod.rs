//! Serving the Kafka protocol: [`connection`] reads frames and keeps the order of answers, [`dispatch`] finds the
//! handler, [`handlers`] has one file per API, [`reads`] the passes of a fetch over shards, [`local`] what runs on the shard that owns a
//! partition, [`check`] what a batch must be, [`errors`] the one mapping to Kafka's codes. [`intake`] bounds what requests take, [`room`]
//! what answers do, [`idle`] ends connections that nothing moves over, [`hangups`] the waits of those
//! whose peer has hung up.

pub mod check;
pub mod configs;
pub mod connection;
pub mod core_dirs;
pub mod create;
pub mod dispatch;
pub mod errors;
pub mod features;
pub mod handlers;
pub mod hangups;
pub mod idle;
pub mod intake;
pub mod local;
pub mod operations;
pub mod raft_voters;
pub mod reads;
pub mod repeats;
pub mod room;
pub mod sessions;
pub mod times;
pub mod topics;
