//! Cluster metadata: [`record`]s are facts in the order they were committed, the [`image`] is what they add up to.

pub mod image;
pub mod record;

pub use image::{Broker, Image, PartitionImage, TopicImage};
pub use record::{Address, ConfigResource, MetadataRecord, Proposal, Registration, Snapshot};
