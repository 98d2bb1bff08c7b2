//! Histories of one replicated partition, drawn from a seed: a leader, its followers, the controller's decisions and the coordinator
//! of a group whose log the partition is are the very code that brokers run; logs, network, time and consumers are models. Nodes
//! crash and forget what was not durable, are paused until they are fenced, lose connections and read late what these brought, learn
//! of metadata late, lose their disks while others have what was on them; replicas are exchanged; consumers pause and come back; then
//! everything is mended and progress is demanded.
//!
//! Checked after every step:
//!
//! 1. What was acknowledged with acks=all stands at its offset in the log of whoever leads, for ever.
//! 2. No offset below a leader's high watermark is ever seen with two values, and a leader's high watermark is backed by its log.
//! 3. Two nodes never lead under one epoch.
//! 4. Nobody is asked to cut below its high watermark.
//! 5. Whoever coordinates knows every commit that was acknowledged, or a later one; no member commits in another's generation, and
//!    generations only grow. In the end all are members, each partition has one consumer, and the group rests.
//! 6. What an idempotent producer wrote is seen once and in order, however often it had to send it, and it is never told of a gap
//!    before the oldest batch that waits for an answer: it would have to give up.
//!
//! 7. Records whose deletion was acknowledged are deleted in the log of whoever leads, for ever.
//!
//! The same seed gives the same history. [`Bug`] plants one, to show that it would be found.

mod checks;
mod consumers;
mod faults;
mod groups;
mod metadata;
mod node;
mod producers;
mod replication;

use std::collections::BTreeMap;

use millrace_engine::{LeaderEpoch, Offset};
use uuid::Uuid;

use self::{
    groups::Groups,
    node::{Node, Queue, Rng, Role, Tell},
    producers::Producers,
};
use crate::metadata::{Image, MetadataRecord, PartitionImage};

const TOPIC: Uuid = Uuid::from_u128(1);
const MIN_INSYNC: usize = 2;
/// Silence after which the controller fences a node, ms.
const SESSION_MS: i64 = 100;
const LAG_MS: i64 = 150;
/// For how long a leader takes no gap for one; longer than anything is under way.
const HANDOVER_MS: i64 = 450;

/// A known mistake, planted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    /// None.
    None,
    /// The high watermark follows the leader's own log.
    HighWatermarkEarly,
    /// A new follower cuts its log at its own high watermark, as Kafka did before KIP-101.
    TruncateToHighWatermark,
    /// A follower answers before what it was sent is durable.
    AckBeforeFlush,
    /// The high watermark moves although too few are in sync, and those that left are still taken for eligible.
    IgnoresMinInsync,
    /// A commit of offsets is acknowledged before others hold it.
    CommitsEarly,
    /// Commits are taken from whoever sends them, as from members that a rebalance has passed by.
    ZombiesCommit,
    /// A new leader takes what was in flight to the one before for a gap.
    GapsAfterHandover,
    /// A leader takes what it refused for want of replicas in sync for a gap.
    GapsAfterRefusal,
    /// A follower cuts its log for whatever order comes, as late as it may come.
    ObeysLateOrders,
    /// A node that comes back takes all that it held for agreed on.
    RecallsTooMuch,
    /// A deletion of records is acknowledged before others hold it.
    DeletesAlone,
}

/// What a history came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    /// Records acknowledged.
    pub acknowledged: usize,
    /// Leaderships that began.
    pub elections: usize,
    /// Logs cut.
    pub cuts: usize,
    /// Deletions of records acknowledged.
    pub deletions: usize,
    /// Commits of offsets acknowledged.
    pub commits: usize,
    /// Times that an idempotent producer began to number anew.
    pub renumberings: usize,
    /// Batches of idempotent producers that were sent again and were there.
    pub duplicates: usize,
    /// Hash of everything that happened.
    pub trace: u64,
}

/// A produce request that waits for its acknowledgement.
struct Waiting {
    node: usize,
    epoch: LeaderEpoch,
    offset: Offset,
    value: u64,
}

struct World {
    rng: Rng,
    bug: Bug,
    now: i64,
    nodes: Vec<Node>,
    image: Image,
    /// Changes agreed on so far.
    version: u64,
    /// A change that nobody has heard of since it was asked for, and which is agreed on then if nothing else was before: when,
    /// the version it was decided on, what.
    late: Option<(i64, u64, Vec<MetadataRecord>)>,
    /// When the controller last heard of a node.
    heard: Vec<i64>,
    /// Between two nodes in order, until the connection breaks.
    links: BTreeMap<(usize, usize), Queue>,
    /// What broken connections still have to be read by one node from another, in order.
    unread: Vec<(usize, usize, Queue)>,
    waiting: Vec<Waiting>,
    /// Deletions that wait for their acknowledgement: of which leader, under which epoch, before which offset.
    deleting: Vec<(usize, LeaderEpoch, Offset)>,
    /// Before it everything was deleted, as somebody was told.
    deleted: Offset,
    next_value: u64,
    acknowledged: BTreeMap<Offset, u64>,
    visible: BTreeMap<Offset, u64>,
    leaders: BTreeMap<LeaderEpoch, usize>,
    /// The last leadership whose log was compared with all that was acknowledged.
    looked_through: Option<LeaderEpoch>,
    groups: Groups,
    producers: Producers,
    faults: bool,
    outcome: Outcome,
    tell: Option<Tell>,
}

/// Runs a history.
///
/// # Errors
/// What was violated, and when.
pub fn run(seed: u64, bug: Bug) -> Result<Outcome, String> {
    World::new(seed, bug, None).live()
}

/// Runs a history and tells what happens in it.
///
/// # Errors
/// What was violated, and when.
pub fn explain(seed: u64, bug: Bug, tell: impl FnMut(String) + 'static) -> Result<Outcome, String> {
    World::new(seed, bug, Some(Box::new(tell))).live()
}

impl World {
    /// The whole history: faults, then none.
    fn live(mut self) -> Result<Outcome, String> {
        for _ in 0..1_500 {
            self.step()?;
        }
        self.mend();
        let before = self.outcome;
        for _ in 0..1_500 {
            self.step()?;
        }
        let p = self.partition();
        for _ in 0..1_000 {
            self.step()?;
        }
        if p != self.partition() {
            return Err(self.fail("leader or ISR changes although nothing is wrong any more".into()));
        }
        if self.outcome.acknowledged == before.acknowledged || self.outcome.commits == before.commits {
            return Err(self.fail("nothing was acknowledged after everything was mended".into()));
        }
        if p.isr.len() != p.replicas.len() || !p.adding.is_empty() || !p.removing.is_empty() || !p.elr.is_empty() {
            return Err(self.fail("not all replicas are in sync after everything was mended".into()));
        }
        if let Some(why) = self.producers_stuck() {
            return Err(self.fail(why));
        }
        match self.group_unsettled() {
            Some(why) => Err(self.fail(why)),
            None => Ok(self.outcome),
        }
    }

    fn new(seed: u64, bug: Bug, tell: Option<Tell>) -> Self {
        let mut rng = Rng(seed.wrapping_mul(2).wrapping_add(1));
        let count = if rng.chance(3) { 5 } else { 3 };
        let nodes: Vec<i32> = (0..count).collect();
        let mut records: Vec<MetadataRecord> = (nodes.iter())
            .map(|n| MetadataRecord::Broker(metadata::registration(*n, 0, 0)))
            .collect();
        records.push(MetadataRecord::Topic {
            id: TOPIC.into_bytes(),
            name: "t".into(),
        });
        let replicas = nodes.iter().copied().take(if rng.chance(2) { 3 } else { 5 }).collect();
        records.push(MetadataRecord::Partition {
            topic: TOPIC.into_bytes(),
            partition: 0,
            state: PartitionImage::new(replicas),
        });
        let image = Image::default().apply(&records);
        let mut world = Self {
            rng,
            bug,
            now: 0,
            nodes: (nodes.iter())
                .map(|_| Node {
                    up: true,
                    epoch: -1,
                    ..Node::default()
                })
                .collect(),
            heard: vec![0; nodes.len()],
            image: Image::default(),
            version: 0,
            late: None,
            links: BTreeMap::new(),
            unread: Vec::new(),
            waiting: Vec::new(),
            deleting: Vec::new(),
            deleted: 0,
            next_value: 1,
            acknowledged: BTreeMap::new(),
            visible: BTreeMap::new(),
            leaders: BTreeMap::new(),
            looked_through: None,
            groups: Groups::new(3),
            producers: Producers::new(2),
            faults: true,
            outcome: Outcome::default(),
            tell,
        };
        world.commit(image);
        world
    }

    fn partition(&self) -> PartitionImage {
        self.image.partition(&TOPIC, 0).expect("it is never deleted").clone()
    }

    fn fail(&self, what: String) -> String {
        let nodes: Vec<String> = (self.nodes.iter())
            .map(|n| {
                let role = match &n.role {
                    Role::None => "nothing".into(),
                    Role::Leads(_) => "leads".into(),
                    Role::Follows(leader) => format!("follows {leader}"),
                };
                format!(
                    "{role} epoch {} log end {} durable {} high watermark {}",
                    n.epoch,
                    n.log.len(),
                    n.durable,
                    n.high_watermark
                )
            })
            .collect();
        format!(
            "at {} ms: {what}; {:?}; {}",
            self.now,
            self.partition(),
            nodes.join(" | ")
        )
    }

    /// Text is made only if somebody may want it: most histories are run for their end alone.
    fn tell(&mut self, what: impl FnOnce(&Self) -> String) {
        if let Some(mut tell) = self.tell.take() {
            tell(format!("{:5} {}", self.now, what(self)));
            self.tell = Some(tell);
        }
    }

    fn trace(&mut self, what: u64) {
        self.outcome.trace = (self.outcome.trace ^ what)
            .wrapping_mul(0x0100_0000_01b3)
            .rotate_left(5);
    }

    fn step(&mut self) -> Result<(), String> {
        self.now += 1;
        if self.faults {
            self.fault();
        }
        for node in 0..self.nodes.len() {
            if self.active(node) {
                self.heard[node] = self.now;
                self.learn(node)?;
                self.flush(node);
                self.tick(node);
                self.note(node);
            }
        }
        self.deliver()?;
        for node in 0..self.nodes.len() {
            if self.active(node) {
                self.push(node);
            }
        }
        self.produce();
        self.acknowledge()?;
        self.delete();
        self.acknowledge_deletions();
        self.produce_in_sequence()?;
        self.coordinate()?;
        self.agree_late();
        self.fence();
        self.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_history_twice() {
        for seed in 0..20 {
            assert_eq!(run(seed, Bug::None), run(seed, Bug::None));
        }
    }
}
