//! CreatePartitions, versions 0 to 3. Each topic succeeds or fails by itself.

use std::rc::Rc;

use kafka_protocol::{
    ResponseError,
    messages::{
        CreatePartitionsRequest, CreatePartitionsResponse, create_partitions_response::CreatePartitionsTopicResult,
    },
};
use millrace_cluster::controller::topics;

use crate::{
    coordinator::controller::{defaults, propose},
    endpoints::nodes_of,
    kafka::{
        errors::Failure,
        repeats::{Named, Repeats},
    },
    node::Node,
};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, request: CreatePartitionsRequest) -> CreatePartitionsResponse {
    let known = node.view();
    let mut results = Vec::with_capacity(request.topics.len());
    let mut repeats = Repeats::among(request.topics.iter().map(|t| t.name.clone()));
    for topic in request.topics {
        let result = CreatePartitionsTopicResult::default().with_name(topic.name.clone());
        match repeats.next(&topic.name) {
            Named::Again => continue,
            Named::First => {
                let failure = Failure::new(ResponseError::InvalidRequest, "Duplicate topic name.");
                results.push(
                    result
                        .with_error_code(failure.code())
                        .with_error_message(failure.text()),
                );
                continue;
            }
            Named::Once => {}
        }
        let assignments: Option<Vec<Vec<i32>>> = topic
            .assignments
            .as_ref()
            .map(|list| list.iter().map(|a| nodes_of(&known.image, &a.broker_ids)).collect());
        let (name, count) = (topic.name.to_string(), topic.count);
        let grown = propose(node, request.validate_only, move |n, image| {
            topics::grow(image, &defaults(n, image), &name, count, assignments.as_deref()).map_err(Failure::from)
        })
        .await;
        results.push(match grown {
            Ok(()) => result,
            Err(failure) => result
                .with_error_code(failure.code())
                .with_error_message(failure.text()),
        });
    }
    CreatePartitionsResponse::default().with_results(results)
}
