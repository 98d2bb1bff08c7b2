//! CreateTopics, versions 2 to 7: counts or manual assignment, configurations, validate-only; topic ids and the settings in
//! force come back (KIP-525).

use std::rc::Rc;

use kafka_protocol::{
    messages::{
        CreateTopicsRequest, CreateTopicsResponse,
        create_topics_response::{CreatableTopicConfigs, CreatableTopicResult},
    },
    protocol::StrBytes,
};
use millrace_cluster::{controller::topics::NewTopic, metadata::ConfigResource};

use crate::{
    endpoints::nodes_of,
    kafka::{
        configs, create,
        errors::Failure,
        repeats::{Named, Repeats},
    },
    node::Node,
};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, version: i16, request: CreateTopicsRequest) -> CreateTopicsResponse {
    let known = node.view();
    let new: Vec<NewTopic> = request
        .topics
        .iter()
        .map(|t| NewTopic {
            name: t.name.to_string(),
            partitions: t.num_partitions,
            replication_factor: t.replication_factor,
            assignments: t
                .assignments
                .iter()
                .map(|a| (a.partition_index, nodes_of(&known.image, &a.broker_ids)))
                .collect(),
            configs: t
                .configs
                .iter()
                .map(|c| (c.name.to_string(), c.value.as_ref().map(|v| v.to_string())))
                .collect(),
        })
        .collect();
    let results = create::topics(node, new.clone(), request.validate_only).await;
    let results = match results {
        Ok(results) => results,
        Err(failure) => new.iter().map(|_| Err(failure.clone())).collect(),
    };
    let view = node.view();
    let mut repeats = Repeats::among(new.iter().map(|t| &t.name));
    let topics = request
        .topics
        .into_iter()
        .zip(new.iter().zip(results))
        .filter(|(_, (new, _))| repeats.next(&&new.name) != Named::Again)
        .map(|(asked, (new, result))| {
            let mut topic = CreatableTopicResult::default().with_name(asked.name);
            match result {
                Ok(id) => {
                    topic.error_message = None;
                    if version >= 7 && !request.validate_only {
                        topic.topic_id = id;
                    }
                    if version >= 5 {
                        let image = view.image.topic(&new.name);
                        let defaults = crate::coordinator::controller::defaults(node, &view.image);
                        topic.num_partitions = match image {
                            Some(image) => image.partitions.len() as i32,
                            None if new.assignments.is_empty() && new.partitions == -1 => defaults.partitions,
                            None => new.partitions.max(new.assignments.len() as i32),
                        };
                        topic.replication_factor = if new.replication_factor == -1 {
                            new.assignments
                                .first()
                                .map_or(defaults.replication_factor, |(_, r)| r.len() as i16)
                        } else {
                            new.replication_factor
                        };
                        let resource = ConfigResource::Topic(new.name.clone());
                        topic.configs = Some(
                            configs::topic_entries(&node.shared.settings, &view.image, &resource)
                                .into_iter()
                                .map(|e| {
                                    CreatableTopicConfigs::default()
                                        .with_name(StrBytes::from_static_str(e.entry.name))
                                        .with_value(Some(StrBytes::from_string(e.value)))
                                        .with_config_source(e.source)
                                })
                                .collect(),
                        );
                    }
                }
                Err(Failure { error, message }) => {
                    topic.error_code = error.code();
                    topic.error_message = Some(StrBytes::from_string(message));
                    if version >= 5 {
                        topic.num_partitions = -1;
                        topic.replication_factor = -1;
                        topic.configs = None;
                    }
                }
            }
            topic
        })
        .collect();
    CreateTopicsResponse::default().with_topics(topics)
}
