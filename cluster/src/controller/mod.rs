//! The controller: `(image, request) → (records, response)`. Records are then committed to the metadata log, and
//! replayed into the next image; nothing here changes anything.

pub mod brokers;
pub mod configs;
pub mod leadership;
pub mod members;
pub mod placement;
pub mod reassign;
pub mod size;
pub mod topics;

use thiserror::Error;

/// Why a request changes nothing. One table maps these to Kafka's codes.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum ControllerError {
    /// A name that no topic may have.
    #[error("topic name {name:?} is invalid: {reason}")]
    InvalidTopic {
        /// As given.
        name: String,
        /// Which rule it breaks.
        reason: &'static str,
    },
    /// The name is taken.
    #[error("topic '{name}' already exists")]
    TopicExists {
        /// The name.
        name: String,
    },
    /// No such topic.
    #[error("this server does not host this topic-partition")]
    UnknownTopic,
    /// No such topic id.
    #[error("this server does not host this topic id")]
    UnknownTopicId,
    /// A partition count that cannot be.
    #[error("{reason}")]
    InvalidPartitions {
        /// Why.
        reason: String,
    },
    /// More replicas than brokers, or none.
    #[error("{reason}")]
    InvalidReplicationFactor {
        /// Why.
        reason: String,
    },
    /// A manual assignment that cannot be.
    #[error("{reason}")]
    InvalidReplicaAssignment {
        /// Why.
        reason: String,
    },
    /// A configuration that is unknown, malformed, or not acted on in a way that would matter.
    #[error("{reason}")]
    InvalidConfig {
        /// Why, and what to do.
        reason: String,
    },
    /// The request contradicts itself.
    #[error("{reason}")]
    InvalidRequest {
        /// Why.
        reason: String,
    },
    /// The id is taken by a broker that answers.
    #[error("{reason}")]
    DuplicateBroker {
        /// By which.
        reason: String,
    },
    /// No such broker.
    #[error("broker {node} is not known here")]
    UnknownBroker {
        /// Its id.
        node: i32,
    },
    /// No such voter.
    #[error("{reason}")]
    UnknownVoter {
        /// What there is.
        reason: String,
    },
    /// Nothing is being exchanged.
    #[error("no reassignment of this partition is in progress")]
    NoReassignment,
    /// A feature level that cannot be.
    #[error("{reason}")]
    InvalidFeature {
        /// Why.
        reason: String,
    },
    /// A build that does not know what it would have to.
    #[error("{reason}")]
    UnsupportedVersion {
        /// Which.
        reason: String,
    },
    /// A limit of the broker.
    #[error("{reason}")]
    PolicyViolation {
        /// Which.
        reason: String,
    },
}

/// Partitions of all topics together that one cluster takes.
pub const PARTITIONS_MAX: usize = 200_000;
