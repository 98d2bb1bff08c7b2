//! Creating topics: what CreateTopics and the auto-creation of Metadata share.

use std::{collections::HashMap, rc::Rc};

use kafka_protocol::ResponseError;
use millrace_cluster::{
    controller::{
        size::Room,
        topics::{self, NewTopic},
    },
    metadata::Image,
};
use uuid::Uuid;

use super::errors::Failure;
use crate::{
    config::Known,
    coordinator::controller::defaults,
    node::{Node, OFFSETS_TOPIC},
};

/// What became of one topic.
pub type Created = Result<Uuid, Failure>;

/// Creates topics, as many in one change of the metadata as it takes; with `validate_only` nothing is changed.
///
/// # Errors
/// [`Failure`] of all; else each topic has a result of its own.
pub async fn topics(node: &Rc<Node>, new: Vec<NewTopic>, validate_only: bool) -> Result<Vec<Created>, Failure> {
    let made = node.router.call(node, 0, move |n| async move {
        let mut times_named: HashMap<&str, usize> = HashMap::new();
        new.iter().for_each(|t| *times_named.entry(&t.name).or_default() += 1);
        let mut results: Vec<Created> = Vec::with_capacity(new.len());
        while results.len() < new.len() {
            let left = &new[results.len()..];
            match some(&n, left, &times_named, validate_only).await {
                Ok(some) => results.extend(some),
                Err(failure) => results.extend(left.iter().map(|_| Err(failure.clone()))),
            }
        }
        results
    });
    Ok(made.await?)
}

/// Creates the first of these topics, at least one.
async fn some(
    node: &Rc<Node>,
    new: &[NewTopic],
    times_named: &HashMap<&str, usize>,
    validate_only: bool,
) -> Result<Vec<Created>, Failure> {
    let change = |image: &Image| {
        let defaults = defaults(node, image);
        let mut image = image.clone();
        let mut records = Vec::new();
        let mut results: Vec<Created> = Vec::new();
        let mut room = Room::default();
        for topic in new {
            if times_named[topic.name.as_str()] > 1 {
                results.push(Err(Failure::new(
                    ResponseError::InvalidRequest,
                    "Duplicate topic name.",
                )));
                continue;
            }
            let id = Uuid::new_v4();
            match topics::create(&image, &defaults, &Known, topic, id) {
                Ok(made) => {
                    if !room.take(&made) {
                        break;
                    }
                    image.extend(&made);
                    records.extend(made);
                    results.push(Ok(id));
                }
                Err(refused) => results.push(Err(refused.into())),
            }
        }
        if validate_only {
            records.clear();
        }
        (records, results)
    };
    node.coordinator().controller.change_for_client(node, change).await
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
