//! Fetch, versions 4 to 18: long polling, size limits (KIP-74), sessions (KIP-227), leader epochs (KIP-320), topic ids
//! (KIP-516), diverging epochs (KIP-595). Without transactions the last stable offset is the high watermark.
//!
//! The first pass reads what is there; if it is less than `min_bytes`, the shards concerned wait for their partitions'
//! high watermarks and the second pass answers.

use std::{
    collections::{HashMap, HashSet},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use kafka_protocol::{
    ResponseError,
    messages::{
        ApiKey, FetchRequest, FetchResponse, TopicName,
        fetch_response::{EpochEndOffset, FetchableTopicResponse, PartitionData},
    },
    protocol::StrBytes,
};
use millrace_engine::sync::Permit;
use millrace_net::kafka::{codec, gather::PIECE_MIN};
use uuid::Uuid;

use crate::{
    kafka::{
        connection::Peer,
        dispatch::Reply,
        idle,
        intake::Held,
        reads::{Asked, Outcomes, Reads},
        sessions::{Partitions, SessionError, SessionPartition, Told, Wanted},
        topics::view_for,
    },
    node::Node,
};

/// Handles a request; returns the encoded response. Records that are many are not copied into it.
pub async fn handle(
    node: &Rc<Node>,
    version: i16,
    correlation_id: i32,
    peer: &Peer,
    held: Held,
    request: FetchRequest,
) -> Reply {
    let encode = |response: &FetchResponse, permit: Permit| {
        let records = response.responses.iter().flat_map(|t| &t.partitions);
        let large: Vec<Bytes> = records
            .filter_map(|p| p.records.clone())
            .filter(|r| r.len() >= PIECE_MIN)
            .collect();
        let pieces = codec::encode_pieces(ApiKey::Fetch, response, version, correlation_id, &large);
        Reply::of(pieces.map(|pieces| Reply::Pieces(pieces, permit)))
    };
    let by_id = version >= 13;
    let by_rack = !node.shared.settings.get("replica.selector.class").is_empty();
    let asked = Asked {
        by_id,
        followers: version >= 11,
        rack: (by_rack && !request.rack_id.is_empty()).then(|| Arc::from(request.rack_id.as_str())),
    };
    let (session_id, epoch) = (request.session_id, request.session_epoch);
    let max_bytes = usize::try_from(request.max_bytes)
        .unwrap_or(0)
        .min(node.shared.settings.number("fetch.max.bytes") as usize);
    let min_bytes = u64::try_from(request.min_bytes).unwrap_or(0).min(max_bytes as u64);
    let wait = Duration::from_millis(u64::try_from(request.max_wait_ms).unwrap_or(0)).min(idle::wait_max(node));
    // Handlers look at the latest view from here on.
    view_for(node, request.topics.iter().map(|t| (t.topic.as_str(), t.topic_id))).await;
    let changed = wanted(&request);
    let incremental = epoch > 0;
    let (session_id, partitions) = if incremental {
        let forgotten = request
            .forgotten_topics_data
            .iter()
            .flat_map(|t| {
                t.partitions.iter().map(|p| SessionPartition {
                    topic: t.topic.to_string(),
                    topic_id: t.topic_id,
                    partition: *p,
                })
            })
            .collect();
        match node
            .sessions
            .borrow_mut()
            .update(session_id, epoch, changed, &forgotten)
        {
            Ok(all) => (session_id, all),
            Err(error) => {
                let code = match error {
                    SessionError::NotFound => ResponseError::FetchSessionIdNotFound,
                    SessionError::InvalidEpoch => ResponseError::InvalidFetchSessionEpoch,
                };
                return encode(
                    &FetchResponse::default().with_error_code(code.code()),
                    node.answers.nothing(),
                );
            }
        }
    } else {
        let mut sessions = node.sessions.borrow_mut();
        sessions.remove(session_id);
        let mut partitions = changed;
        let begins = epoch == 0 && !partitions.is_empty();
        if !begins && !partitions.is_empty() {
            // A session moves partitions that gave records to the end; without one, chance sees to it that each comes first. Turns would
            // meet those of clients that turn their lists round themselves: librdkafka does by one, and by one more of ours, every
            // second of an even number never came first.
            let first = fastrand::usize(..partitions.len());
            partitions.rotate_left(first);
        }
        let partitions = Partitions::new(partitions);
        let id = if begins {
            sessions.create(Rc::clone(&partitions))
        } else {
            0
        };
        (id, partitions)
    };

    drop((request, held));
    let mut reads = Reads::new(node, Rc::clone(&partitions), asked);
    let (mut outcomes, mut permit) = reads.read_within(max_bytes).await;
    let answer_now = permit.bytes() >= min_bytes
        || wait.is_zero()
        || partitions.is_empty()
        || outcomes.iter().any(|o| {
            o.as_ref()
                .map_or(true, |g| g.diverging.is_some() || g.preferred.is_some())
        });
    if !answer_now {
        drop((outcomes, permit));
        reads.wait_for_more(min_bytes, wait, &peer.hangup).await;
        (outcomes, permit) = reads.read_within(max_bytes).await;
    }
    drop(reads);
    let (response, told) = respond(session_id, incremental, by_id, &partitions, outcomes);
    if session_id != 0 {
        node.sessions.borrow_mut().told(session_id, partitions, &told);
    }
    encode(&response, permit)
}

fn wanted(request: &FetchRequest) -> Vec<(SessionPartition, Wanted)> {
    let mut seen = HashSet::new();
    let mut out = Vec::new();
    for topic in &request.topics {
        for p in &topic.partitions {
            let partition = SessionPartition {
                topic: topic.topic.to_string(),
                topic_id: topic.topic_id,
                partition: p.partition,
            };
            // A partition named twice is fetched once.
            if seen.insert(partition.clone()) {
                out.push((
                    partition,
                    Wanted {
                        offset: p.fetch_offset,
                        max_bytes: p.partition_max_bytes,
                        current_leader_epoch: p.current_leader_epoch,
                        last_fetched_epoch: p.last_fetched_epoch,
                        told_high_watermark: -1,
                        told_log_start: -1,
                    },
                ));
            }
        }
    }
    out
}

fn respond(
    session_id: i32,
    incremental: bool,
    by_id: bool,
    partitions: &[(SessionPartition, Wanted)],
    outcomes: Outcomes,
) -> (FetchResponse, Vec<Told>) {
    let mut topics: Vec<FetchableTopicResponse> = Vec::new();
    let mut places: HashMap<(&str, Uuid), usize> = HashMap::new();
    let mut all_told = Vec::with_capacity(partitions.len());
    for ((partition, wanted), outcome) in partitions.iter().zip(outcomes) {
        let mut data = PartitionData::default()
            .with_partition_index(partition.partition)
            .with_high_watermark(-1)
            .with_last_stable_offset(-1)
            .with_log_start_offset(-1)
            .with_preferred_read_replica((-1).into());
        match outcome {
            Ok(given) => {
                let gave = !given.bytes.is_empty();
                all_told.push(Told {
                    high_watermark: given.high_watermark,
                    log_start: given.log_start,
                    gave,
                });
                // An incremental answer leaves out what has nothing new to say.
                if incremental
                    && !gave
                    && given.diverging.is_none()
                    && given.preferred.is_none()
                    && given.high_watermark == wanted.told_high_watermark
                    && given.log_start == wanted.told_log_start
                {
                    continue;
                }
                if let Some(closer) = given.preferred {
                    data.preferred_read_replica = closer.into();
                }
                data.high_watermark = given.high_watermark;
                data.last_stable_offset = given.high_watermark;
                data.log_start_offset = given.log_start;
                data.records = Some(given.bytes);
                if let Some((epoch, end)) = given.diverging {
                    data.diverging_epoch = EpochEndOffset::default().with_epoch(epoch).with_end_offset(end);
                }
            }
            Err(failure) => {
                data.error_code = failure.code();
                data.records = Some(Bytes::new());
                all_told.push(Told {
                    high_watermark: -1,
                    log_start: -1,
                    gave: false,
                });
            }
        }
        let place = *places
            .entry((partition.topic.as_str(), partition.topic_id))
            .or_insert_with(|| {
                topics.push(if by_id {
                    FetchableTopicResponse::default().with_topic_id(partition.topic_id)
                } else {
                    let name = StrBytes::from_string(partition.topic.clone());
                    FetchableTopicResponse::default().with_topic(TopicName(name))
                });
                topics.len() - 1
            });
        topics[place].partitions.push(data);
    }
    let response = FetchResponse::default()
        .with_session_id(session_id)
        .with_responses(topics);
    (response, all_told)
}
