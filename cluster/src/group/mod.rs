//! Consumer groups: the classic protocol (JoinGroup, SyncGroup, Heartbeat, LeaveGroup) and committed offsets.
//!
//! [`classic`] is one group's states; [`coordinator`] holds all groups of a node, their timers and the answers that
//! wait; [`offsets`] what was committed; [`records`] how both stand in `__consumer_offsets`.

pub mod classic;
pub mod coordinator;
pub mod offsets;
pub mod records;

use thiserror::Error;

pub use coordinator::{Coordinator, GroupConfig, Output, ReplyId};

/// Why the coordinator refuses. One table maps these to Kafka's codes.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum GroupError {
    /// Empty group id.
    #[error("the group id is empty")]
    InvalidGroupId,
    /// Outside `group.min.session.timeout.ms` and `group.max.session.timeout.ms`.
    #[error("the session timeout is outside the allowed range")]
    InvalidSessionTimeout,
    /// No protocol in common with the other members.
    #[error("no group protocol in common with the other members")]
    InconsistentProtocol,
    /// Not a member (any more).
    #[error("not a member of the group")]
    UnknownMember,
    /// Another client has joined under the same `group.instance.id`.
    #[error("another client joined under the same group.instance.id")]
    FencedInstance,
    /// A generation that is not the current one.
    #[error("not the group's current generation")]
    IllegalGeneration,
    /// The members are to join again.
    #[error("the group is rebalancing")]
    RebalanceInProgress,
    /// The member is to join again under the id it was just given (KIP-394).
    #[error("join again with the member id given")]
    MemberIdRequired,
    /// `group.max.size` reached.
    #[error("the group is full")]
    GroupFull,
    /// No such group.
    #[error("no such group")]
    GroupNotFound,
    /// Members are there.
    #[error("the group has members")]
    NonEmptyGroup,
    /// A member consumes this topic.
    #[error("the group is subscribed to the topic")]
    SubscribedToTopic,
    /// Commit metadata longer than `offset.metadata.max.bytes`.
    #[error("the commit's metadata is too long")]
    MetadataTooLarge,
    /// A commit whose records are longer than the log takes in one batch.
    #[error("the commit's records are over max.message.bytes of __consumer_offsets: commit fewer partitions at once")]
    CommitTooLarge,
    /// Another broker coordinates the group.
    #[error("another broker coordinates the group")]
    NotCoordinator,
    /// Not loaded from the log yet.
    #[error("the coordinator is loading")]
    Loading,
}
