//! CreatePartitions, versions 0 to 3. Each topic succeeds or fails by itself.

use std::rc::Rc;

use kafka_protocol::messages::{
    CreatePartitionsRequest, CreatePartitionsResponse, create_partitions_response::CreatePartitionsTopicResult,
};
use millrace_cluster::controller::topics;

use crate::{coordinator::controller::defaults, kafka::errors::Failure, node::Node};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, request: CreatePartitionsRequest) -> CreatePartitionsResponse {
    let mut results = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        let result = CreatePartitionsTopicResult::default().with_name(topic.name.clone());
        let assignments: Option<Vec<Vec<i32>>> = topic.assignments.as_ref().map(|list| {
            list.iter()
                .map(|a| a.broker_ids.iter().map(|b| b.0).collect())
                .collect()
        });
        let (name, count, validate_only) = (topic.name.to_string(), topic.count, request.validate_only);
        let grown = node
            .router
            .call(node, 0, move |n| async move {
                let defaults = defaults(&n);
                n.coordinator()
                    .controller
                    .change(&n, |image| {
                        match topics::grow(image, &defaults, &name, count, assignments.as_deref()) {
                            Ok(_) if validate_only => (Vec::new(), Ok(())),
                            Ok(records) => (records, Ok(())),
                            Err(error) => (Vec::new(), Err(Failure::from(error))),
                        }
                    })
                    .await
                    .map_err(Failure::from)
                    .and_then(|r| r)
            })
            .await
            .map_err(Failure::from)
            .and_then(|r| r);
        results.push(match grown {
            Ok(()) => result,
            Err(failure) => result
                .with_error_code(failure.code())
                .with_error_message(failure.text()),
        });
    }
    CreatePartitionsResponse::default().with_results(results)
}
