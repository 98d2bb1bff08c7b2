//! Replication of one partition, without I/O: [`leader`] knows how far each follower is, what it is to be sent next and what
//! the replicas in sync agree on; [`follower`] decides where a log that is not its leader's is cut; [`message`] is what they
//! say to each other; [`handover`] tells a producer's gap from what is still to come.
//!
//! The leader pushes. It first asks a follower where its log stands (a *probe*), has it cut what is not the leader's, epoch by
//! epoch (KIP-101, KIP-279), and from then on sends batches as they are appended, before they are durable at home. A follower
//! answers what is durable with it. The high watermark is what is durable on every replica in sync.

pub mod follower;
pub mod handover;
pub mod leader;
pub mod message;

pub use handover::Handover;
pub use leader::{IsrWish, Leader, Next};
pub use message::{Answer, Request, Standing};
