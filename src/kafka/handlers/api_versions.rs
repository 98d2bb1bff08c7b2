//! ApiVersions, versions 0 to 4: what is served. A version too new is answered in version 0 with error 35, which is
//! what clients fall back on (KIP-511).

use std::rc::Rc;

use kafka_protocol::{
    ResponseError,
    messages::{
        ApiVersionsRequest, ApiVersionsResponse,
        api_versions_response::{ApiVersion, FinalizedFeatureKey, SupportedFeatureKey},
    },
    protocol::StrBytes,
};
use millrace_cluster::metadata::FEATURE_LEVELS;
use millrace_net::kafka::versions::SERVED;

use crate::{kafka::features::LEVEL, node::Node};

fn ranges() -> Vec<ApiVersion> {
    SERVED
        .iter()
        .map(|s| {
            ApiVersion::default()
                .with_api_key(s.api as i16)
                .with_min_version(s.min)
                .with_max_version(s.max)
        })
        .collect()
}

/// Answers.
#[must_use]
pub fn handle(node: &Rc<Node>, version: i16, request: &ApiVersionsRequest) -> ApiVersionsResponse {
    let allowed = |s: &str| {
        let edge = |c: char| c.is_ascii_alphanumeric();
        s.chars().all(|c| edge(c) || c == '-' || c == '.') && s.starts_with(edge) && s.ends_with(edge)
    };
    if version >= 3 && !(allowed(&request.client_software_name) && allowed(&request.client_software_version)) {
        return ApiVersionsResponse::default().with_error_code(ResponseError::InvalidRequest.code());
    }
    let response = ApiVersionsResponse::default().with_api_keys(ranges());
    if version < 3 {
        return response;
    }
    let view = node.view();
    let (name, level) = (StrBytes::from_static_str(LEVEL), view.image.feature_level as i16);
    let supported = SupportedFeatureKey::default()
        .with_name(name.clone())
        .with_min_version(FEATURE_LEVELS.0 as i16)
        .with_max_version(FEATURE_LEVELS.1 as i16);
    let finalized = FinalizedFeatureKey::default()
        .with_name(name)
        .with_min_version_level(level)
        .with_max_version_level(level);
    response
        .with_supported_features(vec![supported])
        .with_finalized_features_epoch(view.image.version as i64)
        .with_finalized_features(vec![finalized])
}

/// The answer to a version too new.
#[must_use]
pub fn unsupported() -> ApiVersionsResponse {
    ApiVersionsResponse::default()
        .with_error_code(ResponseError::UnsupportedVersion.code())
        .with_api_keys(ranges())
}
