//! ListOffsets, versions 1 to 11: earliest (-2), latest (-1), by time, largest timestamp (-3, KIP-734), earliest local
//! (-4), latest tiered (-5) and earliest not yet tiered (-6) of KIPs 405 and 1023, where nothing is tiered.

use std::rc::Rc;

use kafka_protocol::{
    ResponseError,
    messages::{
        ListOffsetsRequest, ListOffsetsResponse,
        list_offsets_response::{ListOffsetsPartitionResponse, ListOffsetsTopicResponse},
    },
};
use uuid::Uuid;

use crate::{
    kafka::{
        errors::Failure,
        local::{self, Lookup},
        repeats::{Named, Repeats},
        topics::{check_epoch, find, view_for},
    },
    node::Node,
    router::scatter,
};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, version: i16, request: ListOffsetsRequest) -> ListOffsetsResponse {
    let named = request.topics.iter().map(|t| (t.name.as_str(), Uuid::nil()));
    let view = view_for(node, named).await;
    let mut work = Vec::new();
    let mut places = Vec::new();
    let asked = (request.topics.iter()).flat_map(|t| t.partitions.iter().map(|p| (t.name.clone(), p.partition_index)));
    let mut repeats = Repeats::among(asked);
    let mut topics = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        let image = find(&view, &topic.name, Uuid::nil(), false);
        let mut partitions = Vec::with_capacity(topic.partitions.len());
        for asked in topic.partitions {
            let mut answer = ListOffsetsPartitionResponse::default()
                .with_partition_index(asked.partition_index)
                .with_timestamp(-1)
                .with_offset(-1);
            let resolve = || {
                let image = image.as_ref().map_err(Clone::clone)?;
                let resolved = Node::resolve(&view, image, asked.partition_index)?;
                check_epoch(
                    if version >= 4 { asked.current_leader_epoch } else { -1 },
                    resolved.leader_epoch,
                )?;
                let lookup = match asked.timestamp {
                    -1 => Lookup::Latest,
                    -2 => Lookup::Earliest,
                    -3 if version >= 7 => Lookup::MaxTimestamp,
                    -4 if version >= 8 => Lookup::Earliest,
                    time if time >= 0 => Lookup::Time(time),
                    -5 if version >= 9 => return Ok(None),
                    -6 if version >= 11 => return Ok(None),
                    _ => return Err(Failure::from(ResponseError::UnsupportedVersion)),
                };
                Ok(Some((resolved.shard, (resolved.key, resolved.leader_epoch, lookup))))
            };
            match repeats.next(&(topic.name.clone(), asked.partition_index)) {
                Named::Again => continue,
                Named::First => answer.error_code = ResponseError::InvalidRequest.code(),
                Named::Once => match resolve() {
                    Ok(Some(item)) => {
                        places.push((topics.len(), partitions.len()));
                        work.push(item);
                    }
                    Ok(None) => {}
                    Err(failure) => answer.error_code = failure.code(),
                },
            }
            partitions.push(answer);
        }
        if partitions.is_empty() {
            continue;
        }
        topics.push(
            ListOffsetsTopicResponse::default()
                .with_name(topic.name)
                .with_partitions(partitions),
        );
    }
    let results = scatter(node, work, |n, list| async move {
        let mut out = Vec::with_capacity(list.len());
        for (key, epoch, lookup) in list {
            out.push(local::lookup(&n, key, epoch, lookup).await);
        }
        out
    })
    .await;
    for ((topic, partition), result) in places.into_iter().zip(results) {
        let slot = &mut topics[topic].partitions[partition];
        match result.map_err(Failure::from).and_then(|r| r) {
            Ok(found) => {
                slot.offset = found.offset;
                slot.timestamp = found.timestamp;
                if version >= 4 {
                    slot.leader_epoch = found.leader_epoch;
                }
            }
            Err(failure) => slot.error_code = failure.code(),
        }
    }
    ListOffsetsResponse::default().with_topics(topics)
}
