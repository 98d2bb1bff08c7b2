//! Produce, versions 3 to 13 (topic ids from 13). Batches are checked on the connection's shard ([`check`]), those of one connection one
//! after the other, and appended on the partition's; all partitions of one shard go there in one message.
//!
//! KIPs: 98 (idempotence), 467 (messages per error), 516 (topic ids). Deliberate gap: transactional batches are
//! refused until transactions exist.

use std::{collections::HashSet, rc::Rc, time::Duration};

use bytes::Bytes;
use kafka_protocol::{
    ResponseError,
    messages::{
        ProduceRequest, ProduceResponse, TopicName,
        produce_response::{BatchIndexAndErrorMessage, PartitionProduceResponse, TopicProduceResponse},
    },
    protocol::StrBytes,
};
use millrace_cluster::metadata::TopicImage;
use millrace_engine::{BatchError, arena::PLACED_MAX, kafka_batch};

use crate::{
    kafka::{
        check::{self, KnownRules, Refused, Rules},
        errors::Failure,
        idle,
        local::{self, Append, Wait},
        topics::{find, view_for},
    },
    node::{Node, OFFSETS_TOPIC, View},
    router::scatter,
};

/// What becomes of a request.
pub enum Outcome {
    /// A response.
    Answer(ProduceResponse),
    /// acks=0: none is expected.
    Silent,
    /// acks=0 and an error: closing is the only way to tell (as Kafka does).
    Close,
}

/// What holds for all batches of a request.
struct Asked {
    now: i64,
    frame_len: usize,
}

/// A request whose batches were checked.
pub struct Prepared {
    acks: i16,
    wait: Wait,
    appends: Vec<(usize, Append)>,
    /// Where each append's answer goes: topic and partition in the response.
    places: Vec<(usize, usize)>,
    responses: Vec<TopicProduceResponse>,
}

/// Checks a request that came in a frame of `frame_len` bytes. What a connection sends is to be prepared in order.
pub async fn prepare(node: &Rc<Node>, version: i16, frame_len: usize, request: ProduceRequest) -> Prepared {
    let named = request.topic_data.iter().map(|t| (t.name.as_str(), t.topic_id));
    let view = view_for(node, named).await;
    let now = node.now_ms();
    let acks = request.acks;
    let asked = Asked { now, frame_len };
    let refused = if !(-1..=1).contains(&acks) {
        Some(Failure::from(ResponseError::InvalidRequiredAcks))
    } else if request.transactional_id.is_some() {
        Some(Failure::new(
            ResponseError::TransactionalIdAuthorizationFailed,
            "transactions are not supported by Millrace yet: produce without transactional.id",
        ))
    } else {
        None
    };
    let mut seen = HashSet::new();
    let mut appends = Vec::new();
    let mut responses = Vec::with_capacity(request.topic_data.len());
    let mut places = Vec::new();
    for topic in request.topic_data {
        let found = find(&view, &topic.name, topic.topic_id, version >= 13);
        let rules = (found.as_ref().ok()).map(|t| KnownRules::get(&node.produce_rules, node, &view, t));
        let mut partitions = Vec::with_capacity(topic.partition_data.len());
        for data in topic.partition_data {
            let result = match (&refused, &found, &rules) {
                (Some(failure), _, _) | (None, Err(failure), _) => Err(failure.clone().into()),
                (None, Ok(image), Some(rules)) if seen.insert((image.id, data.index)) => {
                    prepare_one(node, &view, (image, data.index), data.records, rules, &asked).await
                }
                (None, Ok(_), _) => Err(Refused::from(Failure::new(
                    ResponseError::InvalidRequest,
                    format!("partition {} stands in the request twice", data.index),
                ))),
            };
            let mut response = PartitionProduceResponse::default()
                .with_index(data.index)
                .with_base_offset(-1)
                .with_log_append_time_ms(-1)
                .with_log_start_offset(-1);
            match result {
                Ok((shard, append)) => {
                    if rules.as_ref().is_some_and(|r| r.append_time) {
                        response.log_append_time_ms = now;
                    }
                    places.push((responses.len(), partitions.len()));
                    appends.push((shard, append));
                }
                Err(refused) => {
                    let named = refused.records.into_iter().map(|(index, message)| {
                        BatchIndexAndErrorMessage::default()
                            .with_batch_index(index)
                            .with_batch_index_error_message(Some(StrBytes::from_string(message)))
                    });
                    response.record_errors = named.collect();
                    fail(&mut response, refused.failure);
                }
            }
            partitions.push(response);
        }
        responses.push(
            TopicProduceResponse::default()
                .with_name(if version >= 13 {
                    TopicName::default()
                } else {
                    topic.name
                })
                .with_topic_id(topic.topic_id)
                .with_partition_responses(partitions),
        );
    }
    let wait = match acks {
        0 => Wait::No,
        1 => Wait::Durable,
        _ => {
            let wait = Duration::from_millis(u64::try_from(request.timeout_ms).unwrap_or(0));
            Wait::InSync(wait.min(idle::wait_max(node)))
        }
    };
    Prepared {
        acks,
        wait,
        appends,
        places,
        responses,
    }
}

/// Appends the batches of a request, and waits until they are held as it asks.
pub async fn append(node: &Rc<Node>, prepared: Prepared) -> Outcome {
    let Prepared {
        acks,
        wait,
        appends,
        places,
        mut responses,
    } = prepared;
    let results = scatter(node, appends, move |n, list| async move {
        local::append(&n, list, wait).await
    })
    .await;
    let mut failed = false;
    for ((topic, partition), result) in places.into_iter().zip(results) {
        let response = &mut responses[topic].partition_responses[partition];
        match result.map_err(Failure::from).and_then(|r| r) {
            Ok(acked) => {
                response.base_offset = acked.base_offset;
                response.log_start_offset = acked.log_start;
            }
            Err(failure) => fail(response, failure),
        }
    }
    for topic in &responses {
        failed |= topic.partition_responses.iter().any(|p| p.error_code != 0);
    }
    match (acks, failed) {
        (0, false) => Outcome::Silent,
        (0, true) => Outcome::Close,
        _ => Outcome::Answer(ProduceResponse::default().with_responses(responses)),
    }
}

fn fail(response: &mut PartitionProduceResponse, failure: Failure) {
    response.error_code = failure.code();
    response.error_message = Some(StrBytes::from_string(failure.message));
    response.log_append_time_ms = -1;
}

async fn prepare_one(
    node: &Rc<Node>,
    view: &View,
    (topic, partition): (&TopicImage, i32),
    records: Option<Bytes>,
    rules: &Rules,
    asked: &Asked,
) -> Result<(usize, Append), Refused> {
    let resolved = Node::resolve(view, topic, partition)?;
    if topic.name == OFFSETS_TOPIC {
        return Err(Refused::from(Failure::new(
            ResponseError::InvalidTopicException,
            "only the group coordinator writes to this topic",
        )));
    }
    let records = records.filter(|r| !r.is_empty()).ok_or(BatchError::Invalid {
        reason: "a produce request must hold a record batch for each partition",
    })?;
    let mut batches = kafka_batch::split(records)?;
    let (Some((info, batch)), None) = (batches.pop(), batches.pop()) else {
        return Err(Refused::from(BatchError::Invalid {
            reason: "a produce request must hold exactly one record batch for each partition",
        }));
    };
    let (info, mut batch) = check::batch(node, info, batch, rules, asked.now).await?;
    // The engine copies small batches. A larger one keeps the request it is part of, which must not be many times larger.
    if (PLACED_MAX + 1..asked.frame_len / 4).contains(&batch.len()) {
        batch = Bytes::copy_from_slice(&batch);
    }
    Ok((
        resolved.shard,
        Append {
            key: resolved.key,
            epoch: resolved.leader_epoch,
            batches: vec![(info, batch)],
            min_insync: rules.min_insync,
        },
    ))
}
