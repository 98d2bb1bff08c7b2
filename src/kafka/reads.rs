//! The reads of one fetch: which shard has what, as the metadata says; passes over the shards, and waits on them.

use std::{future::poll_fn, pin::Pin, rc::Rc, sync::Arc, task::Poll, time::Duration};

use kafka_protocol::ResponseError;
use millrace_engine::sync::{Permit, concurrently};

use crate::{
    kafka::{
        errors::Failure,
        hangups::Hangup,
        local::{self, Given, More, Read, Together, Waiting},
        room,
        sessions::{Partitions, SessionPartition, Wanted},
        topics::{check_epoch, find},
    },
    node::{Node, View},
};

/// Pause before a partition that is led here and was not there is looked for again.
const MOVING_PAUSE: Duration = Duration::from_millis(3);
/// How often it is.
const MOVING_LOOKS: usize = 10;

/// What holds for all partitions of a request.
pub struct Asked {
    /// Topics are named by id.
    pub by_id: bool,
    /// The client knows of followers that may be read.
    pub followers: bool,
    /// Where it stands, if replicas are chosen by that.
    pub rack: Option<Arc<str>>,
}

/// What each partition gave, in the order of the request.
pub type Outcomes = Vec<Result<Given, Failure>>;

/// What one shard is asked for.
struct Part {
    shard: usize,
    /// Places in the request.
    places: Vec<usize>,
    reads: Arc<[Read]>,
}

/// The reads of a fetch under one version of the metadata.
pub struct Reads<'a> {
    node: &'a Rc<Node>,
    partitions: Partitions,
    asked: Asked,
    view: Arc<View>,
    parts: Vec<Part>,
    /// What cannot be read, by its place in the request.
    refused: Vec<(usize, Failure)>,
}

impl<'a> Reads<'a> {
    /// The reads of these partitions.
    #[must_use]
    pub fn new(node: &'a Rc<Node>, partitions: Partitions, asked: Asked) -> Self {
        let mut reads = Self {
            node,
            partitions,
            asked,
            view: node.view(),
            parts: Vec::new(),
            refused: Vec::new(),
        };
        reads.plan();
        reads
    }

    fn plan(&mut self) {
        let mut by_shard: Vec<(usize, Vec<usize>, Vec<Read>)> = Vec::new();
        self.refused.clear();
        for (place, (partition, wanted)) in self.partitions.iter().enumerate() {
            match resolve(&self.view, partition, wanted, &self.asked) {
                Err(failure) => self.refused.push((place, failure)),
                Ok((shard, read)) => match by_shard.iter_mut().find(|(s, _, _)| *s == shard) {
                    Some((_, places, reads)) => {
                        places.push(place);
                        reads.push(read);
                    }
                    None => by_shard.push((shard, vec![place], vec![read])),
                },
            }
        }
        self.parts = by_shard
            .into_iter()
            .map(|(shard, places, reads)| Part {
                shard,
                places,
                reads: reads.into(),
            })
            .collect();
    }

    /// Goes by the latest metadata.
    fn renew(&mut self) {
        let view = self.node.view();
        if !Arc::ptr_eq(&view, &self.view) {
            self.view = view;
            self.plan();
        }
    }

    /// Reads every partition, as much together as there is room for answers.
    pub async fn read_within(&mut self, max_bytes: usize) -> (Outcomes, Permit) {
        let mut permit = room::take(&self.node.answers, max_bytes, |time| self.node.host_sleep(time)).await;
        let outcomes = self.read(permit.bytes() as usize).await;
        permit.resize(outcomes.iter().flatten().map(|g| g.bytes.len() as u64).sum());
        (outcomes, permit)
    }

    /// Reads every partition, and once more where one is led here but was not there a moment ago: it goes to another core, or its
    /// leadership begins, and a client that is told so waits for longer than that takes.
    async fn read(&mut self, max_bytes: usize) -> Outcomes {
        self.renew();
        let mut outcomes = self.pass(max_bytes).await;
        for _ in 0..MOVING_LOOKS {
            self.renew();
            let not_there = |place: &usize| {
                let failure = outcomes[*place].as_ref().err();
                failure.is_some_and(|f| f.error == ResponseError::NotLeaderOrFollower)
            };
            if !self.parts.iter().any(|part| part.places.iter().any(not_there)) {
                break;
            }
            self.node.host_sleep(MOVING_PAUSE).await;
            self.renew();
            outcomes = self.pass(max_bytes).await;
        }
        outcomes
    }

    /// Reads every partition once. The shards read at the same time, each for its share of the room; what some leave, those have that could
    /// give more, one after the other.
    async fn pass(&self, max_bytes: usize) -> Outcomes {
        let given = match &*self.parts {
            [part] => vec![self.ask(part, max_bytes, true).await],
            parts => self.ask_all(parts, max_bytes).await,
        };
        let mut outcomes: Vec<Option<Result<Given, Failure>>> = Vec::new();
        outcomes.resize_with(self.partitions.len(), || None);
        for (place, failure) in &self.refused {
            outcomes[*place] = Some(Err(failure.clone()));
        }
        for (part, given) in self.parts.iter().zip(given) {
            for (place, given) in part.places.iter().zip(given) {
                outcomes[*place] = Some(given);
            }
        }
        outcomes
            .into_iter()
            .map(|o| o.unwrap_or_else(|| Err(Failure::unknown_partition())))
            .collect()
    }

    async fn ask_all(&self, parts: &[Part], max_bytes: usize) -> Vec<Outcomes> {
        let share = max_bytes / parts.len().max(1);
        let asked = parts.iter().enumerate().map(|(n, part)| self.ask(part, share, n == 0));
        let mut given = concurrently(parts.len(), asked).await;
        let mut left = max_bytes.saturating_sub(given.iter().map(bytes_of).sum());
        for (n, part) in parts.iter().enumerate() {
            let has = |more| given[n].iter().flatten().any(|g| g.more == more);
            // The first batch may be larger than all limits (KIP-74).
            let nothing_yet = given.iter().all(|g| bytes_of(g) == 0);
            let is_first = nothing_yet && (has(More::BesideOthers) || has(More::BeyondItsOwn));
            // Less than a share is not worth another question.
            if is_first || left >= share && has(More::BesideOthers) {
                let room = bytes_of(&given[n]) + left;
                given[n] = self.ask(part, room, is_first).await;
                left = room.saturating_sub(bytes_of(&given[n]));
            }
        }
        given
    }

    /// What a shard gives of at most `room` bytes.
    async fn ask(&self, part: &Part, room: usize, at_least_one: bool) -> Outcomes {
        let reads = Arc::clone(&part.reads);
        let read_there = move |n| async move { local::read(&n, &reads, room, at_least_one).await };
        match self.node.router.call(self.node, part.shard, read_there).await {
            Ok(given) => given,
            Err(stopping) => part.places.iter().map(|_| Err(stopping.into())).collect(),
        }
    }

    /// Waits until the partitions together have so many bytes, for at most `time`, and no longer than the peer does.
    pub async fn wait_for_more(&mut self, min_bytes: u64, time: Duration, hangup: &Hangup) {
        self.renew();
        let together = Arc::new(Together::new(min_bytes));
        let (waiting, mut waits): (Vec<_>, Vec<_>) = self
            .parts
            .iter()
            .map(|part| {
                let waiting = Arc::new(Waiting::new(Arc::clone(&together)));
                let (reads, there) = (Arc::clone(&part.reads), Arc::clone(&waiting));
                let wait_there = move |n| async move { local::wait_for_bytes(&n, &reads, time, there).await };
                (
                    waiting,
                    Box::pin(self.node.router.call(self.node, part.shard, wait_there)),
                )
            })
            .unzip();
        poll_fn(|cx| {
            let over = waits.iter_mut().any(|wait| Pin::new(wait).poll(cx).is_ready());
            if over || hangup.poll(cx).is_ready() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
        waiting.iter().for_each(|part| part.cancel());
    }
}

fn bytes_of(outcomes: &Outcomes) -> usize {
    outcomes.iter().flatten().map(|g| g.bytes.len()).sum()
}

fn resolve(
    view: &View,
    partition: &SessionPartition,
    wanted: &Wanted,
    asked: &Asked,
) -> Result<(usize, Read), Failure> {
    let topic = find(view, &partition.topic, partition.topic_id, asked.by_id)?;
    let resolved = if asked.followers {
        Node::resolve_copy(view, topic, partition.partition)?
    } else {
        Node::resolve(view, topic, partition.partition)?
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
