//! OffsetFetch, versions 1 to 10: one group, or several from version 8 on (KIP-709); null topics mean all. From 10 on topics
//! are named by id (`net/kafka/newer.rs`).

use std::rc::Rc;

use kafka_protocol::{
    ResponseError,
    messages::{
        GroupId, OffsetFetchRequest, OffsetFetchResponse,
        offset_fetch_response::{
            OffsetFetchResponseGroup, OffsetFetchResponsePartition, OffsetFetchResponsePartitions,
            OffsetFetchResponseTopic, OffsetFetchResponseTopics,
        },
    },
    protocol::StrBytes,
};
use millrace_cluster::group::offsets::Committed;
use millrace_net::kafka::newer;

use crate::{kafka::errors::Failure, node::Node};

/// Topics and partitions wanted; `None` for all.
type Wanted = Option<Vec<(String, Vec<i32>)>>;
/// Per topic: partition and what was committed.
type Found = Vec<(String, Vec<(i32, Option<Committed>)>)>;

/// Handles a request.
pub async fn handle(node: &Rc<Node>, version: i16, request: OffsetFetchRequest) -> OffsetFetchResponse {
    if version >= 8 {
        let mut groups = Vec::with_capacity(request.groups.len());
        for asked in request.groups {
            let mut wanted: Wanted = asked.topics.map(|topics| {
                topics
                    .into_iter()
                    .map(|t| (t.name.to_string(), t.partition_indexes))
                    .collect()
            });
            let by_id = version >= 10;
            let unknown = if by_id {
                ids_to_names(node, &mut wanted)
            } else {
                Vec::new()
            };
            let mut found = fetch(node, asked.group_id.to_string(), wanted).await;
            if by_id && let Ok(found) = &mut found {
                names_to_ids(node, found);
            }
            let mut group = answer_group(asked.group_id, found);
            if group.error_code == 0 {
                group.topics.extend(unknown);
            }
            groups.push(group);
        }
        return OffsetFetchResponse::default().with_groups(groups);
    }
    let wanted: Wanted = request.topics.map(|topics| {
        topics
            .into_iter()
            .map(|t| (t.name.to_string(), t.partition_indexes))
            .collect()
    });
    let asked = wanted.clone().unwrap_or_default();
    match fetch(node, request.group_id.to_string(), wanted).await {
        Ok(found) => OffsetFetchResponse::default().with_topics(old_topics(found, 0)),
        // Version 1 has no place for the error but the partitions.
        Err(failure) => {
            let none = asked
                .into_iter()
                .map(|(t, ps)| (t, ps.into_iter().map(|p| (p, None)).collect()))
                .collect();
            let response = OffsetFetchResponse::default().with_topics(old_topics(none, failure.code()));
            if version >= 2 {
                response.with_error_code(failure.code())
            } else {
                response
            }
        }
    }
}

/// Puts names in the place of ids; returns the answers for ids that no topic has.
fn ids_to_names(node: &Rc<Node>, wanted: &mut Wanted) -> Vec<OffsetFetchResponseTopics> {
    let view = node.view();
    let mut unknown = Vec::new();
    for topics in wanted.iter_mut() {
        topics.retain_mut(|(topic, partitions)| {
            let image = newer::name_as_id(topic).and_then(|id| view.image.topic_by_id(&id));
            if let Some(image) = image {
                topic.clone_from(&image.name);
                return true;
            }
            let answers = partitions.iter().map(|p| {
                OffsetFetchResponsePartitions::default()
                    .with_partition_index(*p)
                    .with_committed_offset(-1)
                    .with_committed_leader_epoch(-1)
                    .with_error_code(ResponseError::UnknownTopicId.code())
            });
            unknown.push(
                OffsetFetchResponseTopics::default()
                    .with_name(StrBytes::from_string(topic.clone()).into())
                    .with_partitions(answers.collect()),
            );
            false
        });
    }
    unknown
}

/// Puts ids in the place of names; topics that are gone have none and are left out.
fn names_to_ids(node: &Rc<Node>, found: &mut Found) {
    let view = node.view();
    found.retain_mut(|(topic, _)| match view.image.topic(topic) {
        Some(image) => {
            *topic = newer::id_as_name(image.id);
            true
        }
        None => false,
    });
}

async fn fetch(node: &Rc<Node>, group: String, wanted: Wanted) -> Result<Found, Failure> {
    node.router
        .call(node, 0, move |n| async move {
            n.coordinator()
                .groups
                .with(&n, &group, |groups, _| {
                    let group = groups.group(&group);
                    Ok(match wanted {
                        Some(topics) => topics
                            .into_iter()
                            .map(|(topic, partitions)| {
                                let found = partitions
                                    .into_iter()
                                    .map(|p| (p, group.and_then(|g| g.offsets.get(&topic, p)).cloned()))
                                    .collect();
                                (topic, found)
                            })
                            .collect(),
                        None => {
                            let mut all: Found = Vec::new();
                            for (topic, p, committed) in group.iter().flat_map(|g| g.offsets.iter()) {
                                match all.last_mut() {
                                    Some((last, list)) if last == topic => list.push((p, Some(committed.clone()))),
                                    _ => all.push((topic.to_owned(), vec![(p, Some(committed.clone()))])),
                                }
                            }
                            all
                        }
                    })
                })
                .await
        })
        .await?
        .map_err(Failure::from)
}

fn old_topics(found: Found, code: i16) -> Vec<OffsetFetchResponseTopic> {
    found
        .into_iter()
        .map(|(topic, partitions)| {
            OffsetFetchResponseTopic::default()
                .with_name(StrBytes::from_string(topic).into())
                .with_partitions(
                    partitions
                        .into_iter()
                        .map(|(index, committed)| {
                            OffsetFetchResponsePartition::default()
                                .with_partition_index(index)
                                .with_committed_offset(committed.as_ref().map_or(-1, |c| c.offset))
                                .with_committed_leader_epoch(committed.as_ref().map_or(-1, |c| c.leader_epoch))
                                .with_metadata(Some(StrBytes::from_string(
                                    committed.map_or_else(String::new, |c| c.metadata),
                                )))
                                .with_error_code(code)
                        })
                        .collect(),
                )
        })
        .collect()
}

fn answer_group(id: GroupId, found: Result<Found, Failure>) -> OffsetFetchResponseGroup {
    let group = OffsetFetchResponseGroup::default().with_group_id(id);
    let found = match found {
        Ok(found) => found,
        Err(failure) => return group.with_error_code(failure.code()),
    };
    group.with_topics(
        found
            .into_iter()
            .map(|(topic, partitions)| {
                OffsetFetchResponseTopics::default()
                    .with_name(StrBytes::from_string(topic).into())
                    .with_partitions(
                        partitions
                            .into_iter()
                            .map(|(index, committed)| {
                                OffsetFetchResponsePartitions::default()
                                    .with_partition_index(index)
                                    .with_committed_offset(committed.as_ref().map_or(-1, |c| c.offset))
                                    .with_committed_leader_epoch(committed.as_ref().map_or(-1, |c| c.leader_epoch))
                                    .with_metadata(Some(StrBytes::from_string(
                                        committed.map_or_else(String::new, |c| c.metadata),
                                    )))
                            })
                            .collect(),
                    )
            })
            .collect(),
    )
}
