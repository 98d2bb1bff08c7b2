//! Creating topics: what CreateTopics and the auto-creation of Metadata share.

use std::{collections::HashMap, rc::Rc};

use kafka_protocol::ResponseError;
use millrace_cluster::controller::topics::{self, NewTopic};
use uuid::Uuid;

use super::errors::Failure;
use crate::{
    config::Known,
    coordinator::controller::defaults,
    node::{Node, OFFSETS_TOPIC},
};

/// What became of one topic.
pub type Created = Result<Uuid, Failure>;

/// Creates topics in one change of the metadata; with `validate_only` nothing is changed.
///
/// # Errors
/// [`Failure`] of the change as a whole; each topic has a result of its own.
pub async fn topics(node: &Rc<Node>, new: Vec<NewTopic>, validate_only: bool) -> Result<Vec<Created>, Failure> {
    node.router
        .call(node, 0, move |n| async move {
            n.coordinator()
                .controller
                .change(&n, |image| {
                    let defaults = defaults(&n, image);
                    let mut image = image.clone();
                    let mut records = Vec::new();
                    let mut times_named: HashMap<&str, usize> = HashMap::new();
                    new.iter().for_each(|t| *times_named.entry(&t.name).or_default() += 1);
                    let results = new
                        .iter()
                        .map(|topic| {
                            if times_named[topic.name.as_str()] > 1 {
                                return Err(Failure::new(
                                    ResponseError::InvalidRequest,
                                    "Duplicate topic in the request.",
                                ));
                            }
                            let id = Uuid::new_v4();
                            let made = topics::create(&image, &defaults, &Known, topic, id)?;
                            image = image.apply(&made);
                            records.extend(made);
                            Ok(id)
                        })
                        .collect();
                    if validate_only {
                        records.clear();
                    }
                    (records, results)
                })
                .await
        })
        .await?
        .map_err(Failure::from)
}

/// Creates topics with the broker's defaults because a client asked for their metadata; returns the refused.
pub async fn automatically(node: &Rc<Node>, names: Vec<String>) -> Vec<(String, Failure)> {
    let wants_offsets = names.iter().any(|n| n == OFFSETS_TOPIC);
    let mut refused = Vec::new();
    if wants_offsets {
        let made = node
            .router
            .call(
                node,
                0,
                |n| async move { n.coordinator().groups.create_topic(&n).await },
            )
            .await;
        if let Err(failure) = made.map_err(Failure::from).and_then(|r| r) {
            refused.push((OFFSETS_TOPIC.to_owned(), failure));
        }
    }
    let mut names: Vec<String> = names.into_iter().filter(|n| n != OFFSETS_TOPIC).collect();
    names.sort_unstable();
    names.dedup();
    let new = names
        .iter()
        .map(|name| NewTopic {
            name: name.clone(),
            partitions: -1,
            replication_factor: -1,
            assignments: Vec::new(),
            configs: Vec::new(),
        })
        .collect();
    match topics(node, new, false).await {
        Ok(results) => {
            for (name, result) in names.into_iter().zip(results) {
                match result {
                    Ok(_) => tracing::info!(topic = name, "topic created automatically"),
                    // Somebody else was quicker.
                    Err(f) if f.error == ResponseError::TopicAlreadyExists => {}
                    Err(failure) => refused.push((name, failure)),
                }
            }
        }
        Err(failure) => refused.extend(names.into_iter().map(|n| (n, failure.clone()))),
    }
    refused
}
