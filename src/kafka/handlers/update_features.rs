//! UpdateFeatures, versions 0 to 2 (KIP-584): raises the cluster's feature level, once every broker runs a build that knows it.

use std::rc::Rc;

use kafka_protocol::{
    ResponseError,
    messages::{UpdateFeaturesRequest, UpdateFeaturesResponse, update_features_response::UpdatableFeatureResult},
};
use millrace_cluster::controller::members;

use crate::{
    coordinator::controller::propose,
    kafka::{errors::Failure, features::LEVEL},
    node::Node,
};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, version: i16, request: UpdateFeaturesRequest) -> UpdateFeaturesResponse {
    let mut response = UpdateFeaturesResponse::default();
    for update in request.feature_updates {
        let known = update.feature.as_str() == LEVEL;
        let level = u16::try_from(update.max_version_level).unwrap_or(0);
        let done = match known {
            true => {
                propose(node, request.validate_only, move |_, image| {
                    members::raise_level(image, level).map_err(Failure::from)
                })
                .await
            }
            false => Err(Failure::new(
                ResponseError::InvalidUpdateVersion,
                format!("the only feature is {LEVEL}"),
            )),
        };
        if let (Err(failure), true) = (&done, version >= 2 || response.error_code == 0) {
            response.error_code = failure.code();
            response.error_message = failure.text();
        }
        if version <= 1 {
            let mut result = UpdatableFeatureResult::default().with_feature(update.feature);
            if let Err(failure) = &done {
                result.error_code = failure.code();
                result.error_message = failure.text();
            }
            response.results.push(result);
        }
    }
    if version <= 1 {
        response.error_code = 0;
        response.error_message = None;
    }
    response
}
