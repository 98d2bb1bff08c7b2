//! DeleteTopics, versions 1 to 6: by name, or by id from version 6.

use std::rc::Rc;

use kafka_protocol::{
    ResponseError,
    messages::{DeleteTopicsRequest, DeleteTopicsResponse, TopicName, delete_topics_response::DeletableTopicResult},
    protocol::StrBytes,
};
use millrace_cluster::controller::topics;
use uuid::Uuid;

use crate::{
    kafka::{
        errors::Failure,
        repeats::{Named, Repeats},
    },
    node::Node,
};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, version: i16, request: DeleteTopicsRequest) -> DeleteTopicsResponse {
    let wanted: Vec<(Option<String>, Uuid)> = if version >= 6 {
        request
            .topics
            .into_iter()
            .map(|t| (t.name.map(|n| n.to_string()), t.topic_id))
            .collect()
    } else {
        request
            .topic_names
            .into_iter()
            .map(|n| (Some(n.to_string()), Uuid::nil()))
            .collect()
    };
    let mut responses = Vec::with_capacity(wanted.len());
    let mut repeats = Repeats::among(wanted.iter().cloned());
    for (name, id) in wanted {
        let given = name.clone();
        let deleted = match repeats.next(&(name.clone(), id)) {
            Named::Again => continue,
            Named::First => Err(Failure::new(
                ResponseError::InvalidRequest,
                "Duplicate topic name or id.",
            )),
            Named::Once => node
                .router
                .call(node, 0, move |n| async move { delete(&n, name, id).await })
                .await
                .map_err(Failure::from)
                .and_then(|r| r),
        };
        let mut response = DeletableTopicResult::default();
        match deleted {
            Ok((name, id)) => {
                response.name = Some(TopicName(StrBytes::from_string(name)));
                if version >= 6 {
                    response.topic_id = id;
                }
            }
            Err(failure) => {
                response.name = given.map(|n| TopicName(StrBytes::from_string(n)));
                if version >= 6 {
                    response.topic_id = id;
                }
                response.error_code = failure.code();
                if version >= 5 {
                    response.error_message = failure.text();
                }
            }
        }
        responses.push(response);
    }
    DeleteTopicsResponse::default().with_responses(responses)
}

async fn delete(node: &Rc<Node>, name: Option<String>, id: Uuid) -> Result<(String, Uuid), Failure> {
    if !node.shared.settings.flag("delete.topic.enable") {
        return Err(Failure::new(
            ResponseError::TopicDeletionDisabled,
            "Topic deletion is disabled: delete.topic.enable is false.",
        ));
    }
    node.coordinator()
        .controller
        .change(node, |image| {
            let topic = match &name {
                Some(_) if !id.is_nil() => {
                    return (
                        Vec::new(),
                        Err(Failure::new(
                            ResponseError::InvalidRequest,
                            "You may not specify both topic name and topic id.",
                        )),
                    );
                }
                Some(name) => image.topic(name).ok_or_else(Failure::unknown_partition),
                None => image.topic_by_id(&id).ok_or(Failure::new(
                    ResponseError::UnknownTopicId,
                    "This server does not host this topic ID.",
                )),
            };
            match topic {
                Ok(topic) => (topics::delete(topic.id), Ok((topic.name.clone(), topic.id))),
                Err(failure) => (Vec::new(), Err(failure)),
            }
        })
        .await?
}
