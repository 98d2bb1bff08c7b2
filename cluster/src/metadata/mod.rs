//! Cluster metadata: [`record`]s are facts in the order they were committed, the [`image`] is what they add up to.

pub mod image;
pub mod record;

pub use image::{Broker, Image, TopicImage};
pub use record::{Address, ConfigResource, Member, MetadataRecord, PartitionImage, Proposal, Registration, Snapshot};

/// Smallest and largest feature level that this build acts on: what may stand in the metadata, in batches between nodes, and in
/// shared topics. A new cluster begins at the largest; an old one is raised to it by hand, once every node runs a build that
/// knows it (Kafka's UpdateFeatures).
pub const FEATURE_LEVELS: (u16, u16) = (1, 1);
