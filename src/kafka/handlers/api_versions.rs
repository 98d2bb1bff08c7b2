//! ApiVersions, versions 0 to 4: what is served. A version too new is answered in version 0 with error 35, which is
//! what clients fall back on (KIP-511).

use kafka_protocol::{
    ResponseError,
    messages::{ApiVersionsRequest, ApiVersionsResponse, api_versions_response::ApiVersion},
};
use millrace_net::kafka::versions::SERVED;

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
pub fn handle(version: i16, request: &ApiVersionsRequest) -> ApiVersionsResponse {
    let allowed = |s: &str| {
        let edge = |c: char| c.is_ascii_alphanumeric();
        s.chars().all(|c| edge(c) || c == '-' || c == '.') && s.starts_with(edge) && s.ends_with(edge)
    };
    if version >= 3 && !(allowed(&request.client_software_name) && allowed(&request.client_software_version)) {
        return ApiVersionsResponse::default().with_error_code(ResponseError::InvalidRequest.code());
    }
    ApiVersionsResponse::default().with_api_keys(ranges())
}

/// The answer to a version too new.
#[must_use]
pub fn unsupported() -> ApiVersionsResponse {
    ApiVersionsResponse::default()
        .with_error_code(ResponseError::UnsupportedVersion.code())
        .with_api_keys(ranges())
}
