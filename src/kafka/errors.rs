//! The one mapping from our errors to Kafka's codes and messages.

use kafka_protocol::{ResponseError, protocol::StrBytes};
use millrace_cluster::{controller::ControllerError, group::GroupError, raft::QuorumError};
use millrace_engine::{AppendError, BatchError, ReadError, StorageError};

use crate::{coordinator::controller::MetadataError, router::Stopping};

/// Bytes of a message.
const MESSAGE_MAX: usize = 1_000;

/// What a client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Kafka's error.
    pub error: ResponseError,
    /// In words, where the response has room for it.
    pub message: String,
}

impl Failure {
    /// An error in its own words. They may quote what was asked for, and are cut where that is long.
    #[must_use]
    pub fn new(error: ResponseError, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > MESSAGE_MAX {
            message.truncate(message.floor_char_boundary(MESSAGE_MAX));
            message.push('…');
        }
        Self { error, message }
    }

    /// Kafka's number.
    #[must_use]
    pub fn code(&self) -> i16 {
        self.error.code()
    }

    /// The message as the protocol carries it.
    #[must_use]
    pub fn text(&self) -> Option<StrBytes> {
        Some(StrBytes::from_string(self.message.clone()))
    }

    /// The coordinator cannot answer now.
    #[must_use]
    pub fn coordinator_not_available() -> Self {
        Self::new(
            ResponseError::CoordinatorNotAvailable,
            "the coordinator is not available",
        )
    }

    /// Another broker leads the partition.
    #[must_use]
    pub fn not_leader() -> Self {
        Self::new(
            ResponseError::NotLeaderOrFollower,
            "this broker does not lead the partition: ask for metadata again",
        )
    }

    /// No such topic or partition.
    #[must_use]
    pub fn unknown_partition() -> Self {
        Self::new(
            ResponseError::UnknownTopicOrPartition,
            "This server does not host this topic-partition.",
        )
    }
}

impl From<ResponseError> for Failure {
    fn from(error: ResponseError) -> Self {
        Self::new(error, error.to_string())
    }
}

impl From<Stopping> for Failure {
    fn from(e: Stopping) -> Self {
        Self::new(ResponseError::NotLeaderOrFollower, e.to_string())
    }
}

fn storage_code(e: &StorageError) -> ResponseError {
    match e {
        StorageError::Io { .. }
        | StorageError::Corrupt { .. }
        | StorageError::Missing { .. }
        | StorageError::Incompatible { .. }
        | StorageError::Poisoned { .. } => ResponseError::KafkaStorageError,
        StorageError::Moving | StorageError::Left => ResponseError::NotLeaderOrFollower,
    }
}

fn batch_code(e: &BatchError) -> ResponseError {
    match e {
        BatchError::Truncated { .. } | BatchError::Crc { .. } => ResponseError::CorruptMessage,
        BatchError::UnsupportedMagic { .. } => ResponseError::UnsupportedForMessageFormat,
        BatchError::Invalid { .. } => ResponseError::InvalidRecord,
        BatchError::Decompress { .. } => ResponseError::CorruptMessage,
    }
}

impl From<StorageError> for Failure {
    fn from(e: StorageError) -> Self {
        Self::new(storage_code(&e), e.to_string())
    }
}

impl From<BatchError> for Failure {
    fn from(e: BatchError) -> Self {
        Self::new(batch_code(&e), e.to_string())
    }
}

impl From<AppendError> for Failure {
    fn from(e: AppendError) -> Self {
        let code = match &e {
            // The metadata had it on this shard: it went a moment ago, and the client is to ask again where to.
            AppendError::UnknownPartition(_) => ResponseError::NotLeaderOrFollower,
            AppendError::Storage(s) => storage_code(s),
            AppendError::DiskFull { .. } => ResponseError::KafkaStorageError,
            AppendError::Batch(b) => batch_code(b),
            AppendError::OutOfOrderSequence { .. } => ResponseError::OutOfOrderSequenceNumber,
            AppendError::ProducerFenced { .. } => ResponseError::InvalidProducerEpoch,
        };
        Self::new(code, e.to_string())
    }
}

impl From<ReadError> for Failure {
    fn from(e: ReadError) -> Self {
        let code = match &e {
            ReadError::UnknownPartition(_) => ResponseError::NotLeaderOrFollower,
            ReadError::OffsetOutOfRange { .. } => ResponseError::OffsetOutOfRange,
            ReadError::Storage(s) => storage_code(s),
            ReadError::Batch(b) => batch_code(b),
        };
        Self::new(code, e.to_string())
    }
}

impl From<ControllerError> for Failure {
    fn from(e: ControllerError) -> Self {
        let code = match &e {
            ControllerError::InvalidTopic { .. } => ResponseError::InvalidTopicException,
            ControllerError::TopicExists { .. } => ResponseError::TopicAlreadyExists,
            ControllerError::UnknownTopic => ResponseError::UnknownTopicOrPartition,
            ControllerError::UnknownTopicId => ResponseError::UnknownTopicId,
            ControllerError::InvalidPartitions { .. } => ResponseError::InvalidPartitions,
            ControllerError::InvalidReplicationFactor { .. } => ResponseError::InvalidReplicationFactor,
            ControllerError::InvalidReplicaAssignment { .. } => ResponseError::InvalidReplicaAssignment,
            ControllerError::InvalidConfig { .. } => ResponseError::InvalidConfig,
            ControllerError::InvalidRequest { .. } => ResponseError::InvalidRequest,
            ControllerError::DuplicateBroker { .. } => ResponseError::DuplicateBrokerRegistration,
            ControllerError::PolicyViolation { .. } => ResponseError::PolicyViolation,
            ControllerError::UnknownBroker { .. } => ResponseError::BrokerIdNotRegistered,
            ControllerError::UnknownVoter { .. } => ResponseError::VoterNotFound,
            ControllerError::NoReassignment => ResponseError::NoReassignmentInProgress,
            ControllerError::InvalidFeature { .. } => ResponseError::FeatureUpdateFailed,
            ControllerError::UnsupportedVersion { .. } => ResponseError::UnsupportedVersion,
        };
        Self::new(code, e.to_string())
    }
}

impl From<MetadataError> for Failure {
    fn from(e: MetadataError) -> Self {
        let code = match &e {
            MetadataError::Quorum(QuorumError::TooLarge { .. }) => ResponseError::PolicyViolation,
            MetadataError::Append(_)
            | MetadataError::Read(_)
            | MetadataError::Storage(_)
            | MetadataError::Quorum(_)
            | MetadataError::Decode(_) => ResponseError::KafkaStorageError,
            MetadataError::NoQuorum | MetadataError::Stopping(_) => ResponseError::NotController,
        };
        Self::new(code, e.to_string())
    }
}

impl From<GroupError> for Failure {
    fn from(e: GroupError) -> Self {
        let code = match e {
            GroupError::InvalidGroupId => ResponseError::InvalidGroupId,
            GroupError::InvalidSessionTimeout => ResponseError::InvalidSessionTimeout,
            GroupError::InconsistentProtocol => ResponseError::InconsistentGroupProtocol,
            GroupError::UnknownMember => ResponseError::UnknownMemberId,
            GroupError::FencedInstance => ResponseError::FencedInstanceId,
            GroupError::IllegalGeneration => ResponseError::IllegalGeneration,
            GroupError::RebalanceInProgress => ResponseError::RebalanceInProgress,
            GroupError::MemberIdRequired => ResponseError::MemberIdRequired,
            GroupError::GroupFull => ResponseError::GroupMaxSizeReached,
            GroupError::GroupNotFound => ResponseError::GroupIdNotFound,
            GroupError::NonEmptyGroup => ResponseError::NonEmptyGroup,
            GroupError::SubscribedToTopic => ResponseError::GroupSubscribedToTopic,
            GroupError::MetadataTooLarge => ResponseError::OffsetMetadataTooLarge,
            GroupError::CommitTooLarge => ResponseError::InvalidCommitOffsetSize,
            GroupError::NotCoordinator => ResponseError::NotCoordinator,
            GroupError::Loading => ResponseError::CoordinatorLoadInProgress,
        };
        Self::new(code, e.to_string())
    }
}
