//! Fetch, versions 4 to 18: long polling, size limits (KIP-74), sessions (KIP-227), leader epochs (KIP-320), topic ids
//! (KIP-516), diverging epochs (KIP-595). Without transactions the last stable offset is the high watermark.
//!
//! The first pass reads what is there; if it is less than `min_bytes`, the shards concerned wait for their partitions'
//! high watermarks and the second pass answers. `min_bytes` is counted per shard: with partitions on several, an answer may come at
//! `max_wait_ms` that Kafka would give a little earlier, never with less.

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
        FetchRequest, FetchResponse, TopicName,
        fetch_response::{EpochEndOffset, FetchableTopicResponse, PartitionData},
    },
    protocol::StrBytes,
};
use millrace_engine::sync::Permit;
use millrace_net::kafka::{codec, gather::PIECE_MIN};
use uuid::Uuid;

use crate::{
    kafka::{
        dispatch::Reply,
        errors::Failure,
        idle,
        local::{self, Cancel, Given, Read},
        room,
        sessions::{SessionError, SessionPartition, Wanted},
        topics::{check_epoch, find, view_for},
    },
    node::{Node, View},
};

/// Pause before a partition that is led here and was not there is looked for again.
const MOVING_PAUSE: Duration = Duration::from_millis(3);
/// How often it is.
const MOVING_LOOKS: usize = 10;

/// What holds for all partitions of a request.
struct Asked {
    by_id: bool,
    /// The client knows of followers that may be read.
    followers: bool,
    /// Where it stands, if replicas are chosen by that.
    rack: Option<Arc<str>>,
}

/// What each partition gave, in the order of the request.
type Outcomes = Vec<Result<Given, Failure>>;

/// Handles a request; returns the encoded response. Records that are many are not copied into it.
pub async fn handle(node: &Rc<Node>, version: i16, correlation_id: i32, request: FetchRequest) -> Reply {
    let encode = |response: &FetchResponse, permit: Permit| {
        let records = response.responses.iter().flat_map(|t| &t.partitions);
        let large: Vec<Bytes> = records
            .filter_map(|p| p.records.clone())
            .filter(|r| r.len() >= PIECE_MIN)
            .collect();
        let pieces = codec::encode_pieces(response, version, correlation_id, &large);
        Reply::Pieces(pieces, permit)
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
    let (session_id, mut partitions) = if incremental {
        let forgotten: Vec<SessionPartition> = request
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
        node.sessions.borrow_mut().remove(session_id);
        let id = if epoch == 0 && !changed.is_empty() {
            node.sessions.borrow_mut().create(changed.clone())
        } else {
            0
        };
        (id, changed)
    };

    if session_id == 0 && !partitions.is_empty() {
        // A session moves partitions that gave records to the end; without one, the turns see to it that each comes first.
        let turn = node.fetch_turns.get();
        node.fetch_turns.set(turn.wrapping_add(1));
        let first = turn % partitions.len();
        partitions.rotate_left(first);
    }
    let (mut outcomes, mut permit) = read_within(node, &partitions, &asked, max_bytes).await;
    let answer_now = permit.bytes() >= min_bytes
        || wait.is_zero()
        || partitions.is_empty()
        || outcomes.iter().any(|o| {
            o.as_ref()
                .map_or(true, |g| g.diverging.is_some() || g.preferred.is_some())
        });
    if !answer_now {
        drop((outcomes, permit));
        wait_for_more(node, &partitions, &asked, min_bytes, wait).await;
        (outcomes, permit) = read_within(node, &partitions, &asked, max_bytes).await;
    }
    encode(
        &respond(node, session_id, incremental, by_id, &partitions, outcomes),
        permit,
    )
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

fn resolve(
    view: &View,
    partition: &SessionPartition,
    wanted: &Wanted,
    asked: &Asked,
) -> Result<(usize, Read), Failure> {
    let name = TopicName(StrBytes::from_string(partition.topic.clone()));
    let topic = find(view, &name, partition.topic_id, asked.by_id)?;
    let resolved = if asked.followers {
        Node::resolve_copy(view, &topic, partition.partition)?
    } else {
        Node::resolve(view, &topic, partition.partition)?
    };
    check_epoch(wanted.current_leader_epoch, resolved.leader_epoch)?;
    Ok((
        resolved.shard,
        Read {
            key: resolved.key,
            epoch: resolved.leader_epoch,
            followers: asked.followers,
            rack: asked.rack.clone(),
            offset: wanted.offset,
            max_bytes: usize::try_from(wanted.max_bytes).unwrap_or(0),
            last_fetched_epoch: wanted.last_fetched_epoch,
        },
    ))
}

/// Reads every partition, as much together as there is room for answers.
async fn read_within(
    node: &Rc<Node>,
    partitions: &[(SessionPartition, Wanted)],
    asked: &Asked,
    max_bytes: usize,
) -> (Outcomes, Permit) {
    let mut permit = room::take(&node.answers, max_bytes, |time| node.host_sleep(time)).await;
    let outcomes = read_all(node, partitions, asked, permit.bytes() as usize).await;
    permit.resize(outcomes.iter().flatten().map(|g| g.bytes.len() as u64).sum());
    (outcomes, permit)
}

/// Reads every partition, and once more where one is led here but was not there a moment ago: it goes to another core, or its
/// leadership begins, and a client that is told so waits for longer than that takes.
async fn read_all(
    node: &Rc<Node>,
    partitions: &[(SessionPartition, Wanted)],
    asked: &Asked,
    max_bytes: usize,
) -> Outcomes {
    let mut outcomes = pass(node, partitions, asked, max_bytes).await;
    for _ in 0..MOVING_LOOKS {
        let view = node.view();
        let moves = outcomes.iter().zip(partitions).any(|(outcome, (partition, wanted))| {
            let not_there = |f: &Failure| f.error == ResponseError::NotLeaderOrFollower;
            outcome.as_ref().is_err_and(not_there) && resolve(&view, partition, wanted, asked).is_ok()
        });
        if !moves {
            break;
        }
        node.host_sleep(MOVING_PAUSE).await;
        outcomes = pass(node, partitions, asked, max_bytes).await;
    }
    outcomes
}

/// Reads every partition once, shard after shard, so that the limits hold over all.
async fn pass(node: &Rc<Node>, partitions: &[(SessionPartition, Wanted)], asked: &Asked, max_bytes: usize) -> Outcomes {
    let view = node.view();
    let mut outcomes: Vec<Option<Result<Given, Failure>>> = Vec::with_capacity(partitions.len());
    let mut by_shard: Vec<(usize, Vec<usize>, Vec<Read>)> = Vec::new();
    for (index, (partition, wanted)) in partitions.iter().enumerate() {
        match resolve(&view, partition, wanted, asked) {
            Err(failure) => outcomes.push(Some(Err(failure))),
            Ok((shard, read)) => {
                outcomes.push(None);
                match by_shard.iter_mut().find(|(s, _, _)| *s == shard) {
                    Some((_, indexes, reads)) => {
                        indexes.push(index);
                        reads.push(read);
                    }
                    None => by_shard.push((shard, vec![index], vec![read])),
                }
            }
        }
    }
    let mut room = max_bytes;
    let mut nothing_yet = true;
    for (shard, indexes, reads) in by_shard {
        let at_least_one = nothing_yet;
        let result = node
            .router
            .call(node, shard, move |n| async move {
                local::read(&n, reads, room, at_least_one).await
            })
            .await;
        match result {
            Ok(given) => {
                for (index, given) in indexes.into_iter().zip(given) {
                    if let Ok(g) = &given {
                        room = room.saturating_sub(g.bytes.len());
                        nothing_yet &= g.bytes.is_empty();
                    }
                    outcomes[index] = Some(given);
                }
            }
            Err(stopping) => indexes
                .into_iter()
                .for_each(|i| outcomes[i] = Some(Err(stopping.into()))),
        }
    }
    outcomes
        .into_iter()
        .map(|o| o.unwrap_or_else(|| Err(Failure::unknown_partition())))
        .collect()
}

async fn wait_for_more(
    node: &Rc<Node>,
    partitions: &[(SessionPartition, Wanted)],
    asked: &Asked,
    min_bytes: u64,
    wait: Duration,
) {
    let view = node.view();
    let mut by_shard: HashMap<usize, Vec<Read>> = HashMap::new();
    for (partition, wanted) in partitions {
        if let Ok((shard, read)) = resolve(&view, partition, wanted, asked) {
            by_shard.entry(shard).or_default().push(read);
        }
    }
    let cancel: Vec<Arc<Cancel>> = by_shard.iter().map(|_| Arc::default()).collect();
    let waits: Vec<_> = by_shard
        .into_iter()
        .zip(&cancel)
        .map(|((shard, reads), cancel)| {
            let (node, cancel) = (Rc::clone(node), Arc::clone(cancel));
            Box::pin(async move {
                let router = node.router.clone();
                let wait_there =
                    move |n| async move { local::wait_for_bytes(&n, reads, min_bytes, wait, cancel).await };
                let _ = router.call(&node, shard, wait_there).await;
            })
        })
        .collect();
    first_of(waits).await;
    cancel.iter().for_each(|c| c.cancel());
}

/// Waits for the first of several.
async fn first_of<F: Future<Output = ()> + Unpin>(mut waits: Vec<F>) {
    std::future::poll_fn(|cx| {
        for wait in &mut waits {
            if std::pin::Pin::new(wait).poll(cx).is_ready() {
                return std::task::Poll::Ready(());
            }
        }
        std::task::Poll::Pending
    })
    .await;
}

fn respond(
    node: &Rc<Node>,
    session_id: i32,
    incremental: bool,
    by_id: bool,
    partitions: &[(SessionPartition, Wanted)],
    outcomes: Outcomes,
) -> FetchResponse {
    let mut topics: Vec<FetchableTopicResponse> = Vec::new();
    let mut places: HashMap<(String, Uuid), usize> = HashMap::new();
    let mut told = HashMap::new();
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
                told.insert(partition.clone(), (given.high_watermark, given.log_start, gave));
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
                told.insert(partition.clone(), (-1, -1, false));
            }
        }
        let topic = (partition.topic.clone(), partition.topic_id);
        let place = *places.entry(topic).or_insert_with(|| {
            topics.push(if by_id {
                FetchableTopicResponse::default().with_topic_id(partition.topic_id)
            } else {
                FetchableTopicResponse::default().with_topic(TopicName(StrBytes::from_string(partition.topic.clone())))
            });
            topics.len() - 1
        });
        topics[place].partitions.push(data);
    }
    if session_id != 0 {
        node.sessions.borrow_mut().told(session_id, &told);
    }
    FetchResponse::default()
        .with_session_id(session_id)
        .with_responses(topics)
}
