//! The cluster's feature level, as ApiVersions and UpdateFeatures name it (KIP-584).

/// Name of the feature.
pub const LEVEL: &str = "millrace.version";
