//! DescribeAcls, versions 1 to 3: there is no authorizer, and clients take SECURITY_DISABLED for "known, off".

use kafka_protocol::{ResponseError, messages::DescribeAclsResponse, protocol::StrBytes};

/// Answers.
#[must_use]
pub fn handle() -> DescribeAclsResponse {
    DescribeAclsResponse::default()
        .with_error_code(ResponseError::SecurityDisabled.code())
        .with_error_message(Some(StrBytes::from_static_str("No Authorizer is configured.")))
}
