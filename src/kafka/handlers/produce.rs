//! Produce, versions 3 to 13 (topic ids from 13). Batches are checked on the connection's shard and appended on the
//! partition's; all partitions of one shard go there in one message.
//!
//! KIPs: 98 (idempotence), 467 (messages per error), 516 (topic ids). Deliberate gap: transactional batches are
//! refused until transactions exist.

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
    rc::Rc,
    time::Duration,
};

use bytes::Bytes;
use kafka_protocol::{
    ResponseError,
    messages::{
        ProduceRequest, ProduceResponse, TopicName,
        produce_response::{PartitionProduceResponse, TopicProduceResponse},
    },
    protocol::StrBytes,
};
use millrace_cluster::metadata::{ConfigResource, TopicImage};
use millrace_engine::{
    BatchError,
    arena::PLACED_MAX,
    kafka_batch::{self, BATCH_HEADER_LEN, BatchInfo},
};
use millrace_net::kafka::compression;
use uuid::Uuid;

use crate::{
    kafka::{
        errors::Failure,
        idle,
        local::{self, Append, Wait},
        topics::{find, view_for},
    },
    node::{Node, OFFSETS_TOPIC, View, topic_setting},
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

/// The settings of a topic that a batch must meet.
struct Rules {
    max_bytes: usize,
    append_time: bool,
    codec: Option<i16>,
    before_max_ms: i64,
    after_max_ms: i64,
    min_insync: usize,
    unpack_max: usize,
}

/// The rules of topics as of one version of the metadata: to look each setting up takes longer than to check a batch.
#[derive(Default)]
pub struct KnownRules {
    version: u64,
    of: HashMap<Uuid, Rc<Rules>>,
}

impl KnownRules {
    fn get(known: &RefCell<Self>, node: &Node, view: &View, topic: &TopicImage) -> Rc<Rules> {
        let mut known = known.borrow_mut();
        if known.version != view.image.version {
            known.of.clear();
            known.version = view.image.version;
        }
        let rules = known.of.entry(topic.id);
        Rc::clone(rules.or_insert_with(|| Rc::new(Rules::of(node, view, &topic.name))))
    }
}

impl Rules {
    fn of(node: &Node, view: &View, topic: &str) -> Self {
        let resource = ConfigResource::Topic(topic.to_owned());
        let get = |name| topic_setting(&node.shared.settings, &view.image, &resource, name);
        let number = |name| get(name).parse::<i64>().unwrap_or(i64::MAX);
        Self {
            max_bytes: number("max.message.bytes") as usize,
            append_time: get("message.timestamp.type") == "LogAppendTime",
            codec: match get("compression.type") {
                "uncompressed" => Some(0),
                "gzip" => Some(1),
                "snappy" => Some(2),
                "lz4" => Some(3),
                "zstd" => Some(4),
                _ => None,
            },
            before_max_ms: number("message.timestamp.before.max.ms"),
            after_max_ms: number("message.timestamp.after.max.ms"),
            min_insync: number("min.insync.replicas") as usize,
            unpack_max: node.shared.settings.number("decompress.max.bytes") as usize,
        }
    }
}

/// What holds for all batches of a request.
struct Asked {
    now: i64,
    frame_len: usize,
}

/// Handles a request that came in a frame of `frame_len` bytes.
pub async fn handle(node: &Rc<Node>, version: i16, frame_len: usize, request: ProduceRequest) -> Outcome {
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
    // Where each append's answer goes: topic and partition in the response.
    let mut places = Vec::new();
    for topic in request.topic_data {
        let found = find(&view, &topic.name, topic.topic_id, version >= 13);
        let rules = (found.as_ref().ok()).map(|t| KnownRules::get(&node.produce_rules, node, &view, t));
        let mut partitions = Vec::with_capacity(topic.partition_data.len());
        for data in topic.partition_data {
            let result = match (&refused, &found, &rules) {
                (Some(failure), _, _) | (None, Err(failure), _) => Err(failure.clone()),
                (None, Ok(image), Some(rules)) if seen.insert((image.id, data.index)) => {
                    prepare(&view, image, data.index, data.records, rules, &asked)
                }
                (None, Ok(_), _) => Err(Failure::new(
                    ResponseError::InvalidRequest,
                    format!("partition {} stands in the request twice", data.index),
                )),
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
                Err(failure) => fail(&mut response, failure),
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

fn prepare(
    view: &View,
    topic: &TopicImage,
    partition: i32,
    records: Option<Bytes>,
    rules: &Rules,
    asked: &Asked,
) -> Result<(usize, Append), Failure> {
    let resolved = Node::resolve(view, topic, partition)?;
    if topic.name == OFFSETS_TOPIC {
        return Err(Failure::new(
            ResponseError::InvalidTopicException,
            "only the group coordinator writes to this topic",
        ));
    }
    let records = records.filter(|r| !r.is_empty()).ok_or(BatchError::Invalid {
        reason: "a produce request must hold a record batch for each partition",
    })?;
    let mut batches = kafka_batch::split(records)?;
    let (Some((info, batch)), None) = (batches.pop(), batches.pop()) else {
        return Err(BatchError::Invalid {
            reason: "a produce request must hold exactly one record batch for each partition",
        }
        .into());
    };
    check(&info, &batch, rules, asked.now)?;
    let (info, mut batch) = rewrite(info, batch, rules, asked.now)?;
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

fn check(info: &BatchInfo, batch: &Bytes, rules: &Rules, now: i64) -> Result<(), Failure> {
    if batch.len() > rules.max_bytes {
        return Err(Failure::new(
            ResponseError::MessageTooLarge,
            format!(
                "a batch of {} bytes is over max.message.bytes ({})",
                batch.len(),
                rules.max_bytes
            ),
        ));
    }
    if info.is_transactional() {
        return Err(Failure::new(
            ResponseError::InvalidRequest,
            "transactional batches are not supported by Millrace yet",
        ));
    }
    if info.is_control() {
        return Err(BatchError::Invalid {
            reason: "clients may not write control batches",
        }
        .into());
    }
    if info.is_log_append_time() {
        return Err(Failure::new(
            ResponseError::InvalidTimestamp,
            "a producer may not set the timestamp type LogAppendTime",
        ));
    }
    if !rules.append_time {
        let (first, last) = (info.base_timestamp, info.max_timestamp);
        let too_old = first >= 0 && now.saturating_sub(first) > rules.before_max_ms;
        let too_new = last.saturating_sub(now) > rules.after_max_ms;
        if too_old || too_new {
            return Err(Failure::new(
                ResponseError::InvalidTimestamp,
                format!("timestamps {first} to {last} are outside the range that the topic allows around {now}"),
            ));
        }
    }
    Ok(())
}

/// The only reasons to touch a payload: the topic's own codec, and the broker's clock.
fn rewrite(info: BatchInfo, mut batch: Bytes, rules: &Rules, now: i64) -> Result<(BatchInfo, Bytes), Failure> {
    let unpacked = |e: compression::CompressionError| BatchError::Decompress { reason: e.to_string() };
    if let Some(codec) = rules.codec.filter(|c| *c != info.compression()) {
        let packed = &batch[BATCH_HEADER_LEN..];
        let plain = if info.compression() == 0 {
            batch.slice(BATCH_HEADER_LEN..)
        } else {
            compression::decompress(info.compression(), packed, rules.unpack_max).map_err(unpacked)?
        };
        let packed = compression::compress(codec, &plain).map_err(unpacked)?;
        batch = kafka_batch::with_records(&batch, codec, &packed);
    }
    if rules.append_time {
        batch = kafka_batch::with_append_time(&batch, now);
    }
    if rules.codec.is_none() && !rules.append_time {
        return Ok((info, batch));
    }
    let (info, _) = kafka_batch::parse(&batch)?;
    Ok((info, batch))
}
