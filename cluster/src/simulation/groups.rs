//! The group coordinator of a world: the very state machine that brokers run, with the world's partition as its log. Whoever leads
//! coordinates, once it knows what of its log the others hold.

use std::collections::BTreeMap;

use bytes::Bytes;
use millrace_engine::{LeaderEpoch, Offset};

use super::{Bug, World, consumers::Consumer, node::Role};
use crate::group::{
    Coordinator, GroupConfig, Output,
    coordinator::Caller,
    offsets::Committed,
    records::{self, GroupRecord},
};

/// The one group.
pub(super) const GROUP: &str = "g";
/// What it consumes; nobody writes to it, commits count by themselves.
pub(super) const CONSUMED: &str = "consumed";
/// Partitions of that.
pub(super) const PARTITIONS: i32 = 4;
/// Silence of a member after which it is out, ms.
pub(super) const MEMBER_SESSION_MS: i32 = 200;

/// What an entry of the log says of groups.
#[derive(Clone)]
pub(super) struct Written {
    records: Vec<(Bytes, Option<Bytes>)>,
    /// For a commit: under which generation.
    commit: Option<i32>,
}

/// A commit that is not acknowledged yet.
struct Commit {
    at: Offset,
    partition: i32,
    position: i64,
}

/// A node's groups.
pub(super) struct Coordinating {
    epoch: LeaderEpoch,
    /// They are read once the high watermark is there.
    end: Offset,
    loaded: bool,
    pub state: Coordinator,
    /// Outputs wait until what was appended here is held by all in sync.
    persisting: Option<Offset>,
    commits: Vec<Commit>,
}

/// All there is of groups.
pub(super) struct Groups {
    pub consumers: Vec<Consumer>,
    /// By the value that stands in the log for it.
    written: BTreeMap<u64, Written>,
    /// By partition: where the last acknowledged commit stands in the log.
    acknowledged: BTreeMap<i32, Offset>,
    pub next_id: u64,
    pub next_position: i64,
    /// When the group last became another.
    pub changed: i64,
    generation: i32,
}

impl Groups {
    pub fn new(consumers: usize) -> Self {
        Self {
            consumers: (0..consumers).map(|_| Consumer::default()).collect(),
            written: BTreeMap::new(),
            acknowledged: BTreeMap::new(),
            next_id: 0,
            next_position: 1,
            changed: 0,
            generation: 0,
        }
    }

    pub fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}

fn config() -> GroupConfig {
    GroupConfig {
        min_session_timeout_ms: 1,
        max_session_timeout_ms: 10_000,
        initial_rebalance_delay_ms: 20,
        max_size: 10,
        metadata_max_bytes: 100,
        offsets_retention_ms: i64::MAX,
    }
}

impl World {
    /// Coordinators and consumers do what is due.
    pub(super) fn coordinate(&mut self) -> Result<(), String> {
        for node in 0..self.nodes.len() {
            if self.active(node) {
                self.take_up(node)?;
                self.carry_out(node);
                self.acknowledge_commits(node)?;
            }
        }
        for consumer in 0..self.groups.consumers.len() {
            self.consume(consumer);
        }
        Ok(())
    }

    /// The coordinator at a node, if it has its groups.
    pub(super) fn coordinator(&mut self, node: usize) -> Option<&mut Coordinator> {
        if !self.active(node) {
            return None;
        }
        let coordinating = self.nodes[node].coordinating.as_mut()?;
        coordinating.loaded.then_some(&mut coordinating.state)
    }

    /// A leadership begins or ends, or its groups can be read.
    fn take_up(&mut self, node: usize) -> Result<(), String> {
        let n = &mut self.nodes[node];
        if !matches!(n.role, Role::Leads(_)) {
            n.coordinating = None;
            return Ok(());
        }
        if n.coordinating.as_ref().map(|c| c.epoch) != Some(n.epoch) {
            n.coordinating = Some(Coordinating {
                epoch: n.epoch,
                end: n.log_end(),
                loaded: false,
                state: Coordinator::new(config()),
                persisting: None,
                commits: Vec::new(),
            });
        }
        match &n.coordinating {
            Some(c) if !c.loaded && n.high_watermark >= c.end => self.load_groups(node),
            _ => Ok(()),
        }
    }

    fn load_groups(&mut self, node: usize) -> Result<(), String> {
        let now = self.now;
        let is_latest = self.leader() == Some(node);
        let n = &mut self.nodes[node];
        let Some(coordinating) = &mut n.coordinating else {
            return Ok(());
        };
        // By partition: where its last commit stands.
        let mut last = BTreeMap::new();
        let mut generation = 0;
        let mut violation = None;
        for (at, (_, value)) in n.log.iter().enumerate() {
            let Some(written) = self.groups.written.get(value) else {
                continue;
            };
            for (key, value) in &written.records {
                let record = records::decode(key, value.as_deref(), now).expect("it was encoded here");
                match &record {
                    GroupRecord::Offset { partition, .. } => {
                        last.insert(*partition, at as Offset);
                    }
                    GroupRecord::Group { state: Some(group), .. } => {
                        if group.generation <= generation {
                            violation = Some(format!("generation {} follows {generation}", group.generation));
                        }
                        generation = group.generation;
                    }
                    GroupRecord::Group { state: None, .. } => generation = 0,
                }
                coordinating.state.load(record, now);
            }
        }
        coordinating.state.loaded(|_| true, now);
        coordinating.loaded = true;
        for (partition, at) in &self.groups.acknowledged {
            if is_latest && last.get(partition) < Some(at) {
                violation = Some(format!(
                    "the commit for partition {partition} that was acknowledged at {at} is not known to coordinator {node}"
                ));
            }
        }
        self.tell(|_| format!("node {node} coordinates, generation {generation}"));
        violation.map_or(Ok(()), |v| Err(self.fail(v)))
    }

    fn write(&mut self, node: usize, written: Written) -> Offset {
        let value = self.next_value;
        self.next_value += 1;
        self.groups.written.insert(value, written);
        let n = &mut self.nodes[node];
        n.append((n.epoch, value));
        n.log_end() - 1
    }

    /// What the state machine asks for, in its order.
    fn carry_out(&mut self, node: usize) {
        let now = self.now;
        let Some(state) = self.coordinator(node) else { return };
        state.tick(now);
        let generation = state.group(GROUP).map_or(0, |g| g.generation);
        if generation != self.groups.generation {
            self.groups.generation = generation;
            self.groups.changed = now;
        }
        loop {
            let n = &mut self.nodes[node];
            let high_watermark = n.high_watermark;
            let Some(coordinating) = &mut n.coordinating else {
                return;
            };
            if coordinating.persisting.is_some_and(|at| high_watermark <= at) {
                return;
            }
            coordinating.persisting = None;
            match coordinating.state.poll_output() {
                None => return,
                Some(Output::Persist { records, .. }) => {
                    let commit = None;
                    let at = self.write(node, Written { records, commit });
                    if let Some(coordinating) = &mut self.nodes[node].coordinating {
                        coordinating.persisting = Some(at);
                    }
                }
                Some(Output::Joined(reply, answer)) => self.joined(reply, answer),
                Some(Output::Synced(reply, answer)) => self.synced(reply, answer),
            }
        }
    }

    /// A member commits: checked and appended in one go, acknowledged later; false if it is refused.
    pub(super) fn commit_offset(&mut self, node: usize, member: &str, generation: i32, partition: i32) -> bool {
        let (now, bug) = (self.now, self.bug);
        let Some(state) = self.coordinator(node) else {
            return true;
        };
        let caller = Caller {
            member_id: member,
            instance_id: None,
            generation,
        };
        if state.check_commit(GROUP, caller, now).is_err() && bug != Bug::ZombiesCommit {
            return false;
        }
        // What the coordinator wants persisted stands before it.
        self.carry_out(node);
        let position = self.groups.next_position;
        self.groups.next_position += 1;
        let key = records::offset_key(GROUP, CONSUMED, partition);
        let value = records::offset_value(&committed(position, now));
        let written = Written {
            records: vec![(key, Some(value))],
            commit: Some(generation),
        };
        let at = self.write(node, written);
        if let Some(coordinating) = &mut self.nodes[node].coordinating {
            coordinating.commits.push(Commit {
                at,
                partition,
                position,
            });
        }
        true
    }

    fn acknowledge_commits(&mut self, node: usize) -> Result<(), String> {
        let (now, bug) = (self.now, self.bug);
        let n = &mut self.nodes[node];
        let held = match bug {
            Bug::CommitsEarly => n.log_end(),
            _ => n.high_watermark,
        };
        let Some(coordinating) = &mut n.coordinating else {
            return Ok(());
        };
        let mut done = Vec::new();
        while coordinating.commits.first().is_some_and(|c| c.at < held) {
            let commit = coordinating.commits.remove(0);
            let value = committed(commit.position, now);
            (coordinating.state).committed(GROUP, CONSUMED, commit.partition, value, now);
            done.push(commit);
        }
        for commit in done {
            self.groups.acknowledged.insert(commit.partition, commit.at);
            self.outcome.commits += 1;
            self.trace(commit.at as u64);
            let entries = self.nodes[node].log[..=commit.at as usize].iter().rev();
            let mut before = entries.filter_map(|(_, value)| self.groups.written.get(value));
            let generation = before.next().and_then(|w| w.commit);
            let current = before.find(|w| w.commit.is_none()).and_then(|w| {
                let (key, value) = w.records.last()?;
                match records::decode(key, value.as_deref(), now)? {
                    GroupRecord::Group { state, .. } => state.map(|g| g.generation),
                    GroupRecord::Offset { .. } => None,
                }
            });
            if generation != current {
                let text = format!("a commit of generation {generation:?} was taken in generation {current:?}");
                return Err(self.fail(text));
            }
        }
        Ok(())
    }
}

fn committed(offset: i64, now: i64) -> Committed {
    Committed {
        offset,
        leader_epoch: -1,
        metadata: String::new(),
        commit_ms: now,
    }
}
