//! The controller of a world: what is agreed on, and when nodes learn of it.

use millrace_engine::{
    Offset,
    log::{EpochCache, ProducerStates},
};

use super::{
    Bug, HANDOVER_MS, LAG_MS, MIN_INSYNC, SESSION_MS, TOPIC, World,
    node::{Node, Role},
};
use crate::{
    controller::{
        brokers,
        reassign::{self, Wish},
    },
    metadata::{Image, MetadataRecord, Registration},
    replica::{Handover, Leader},
};

pub(super) fn registration(node: i32, start: u64, directory: u8) -> Registration {
    Registration {
        node,
        incarnation: u128::from(start).to_be_bytes(),
        directory: [directory; 16],
        clients: Vec::new(),
        peers: Vec::new(),
        rack: None,
        min_insync: MIN_INSYNC as u32,
        start,
        levels: (0, 1),
    }
}

impl World {
    /// The controller's change is agreed on; nodes learn of it sooner or later, in order.
    pub(super) fn commit(&mut self, image: Image) {
        self.image = image;
        self.version += 1;
        let partition = self.partition();
        self.tell(|w| {
            format!(
                "committed {:?}, active {:?}",
                w.partition(),
                w.image.active().collect::<Vec<_>>()
            )
        });
        for node in 0..self.nodes.len() {
            // A broker takes up no metadata from before its registration: it might lead under an epoch that it has forgotten.
            if !self.nodes[node].up {
                continue;
            }
            let delay = self.rng.below(if self.faults { 25 } else { 3 }) as i64;
            let last = self.nodes[node].news.back().map_or(0, |(at, _)| *at);
            self.nodes[node]
                .news
                .push_back(((self.now + delay).max(last), partition.clone()));
        }
    }

    pub(super) fn change(&mut self, records: &[MetadataRecord]) {
        if !records.is_empty() {
            let next = self.image.apply(records);
            self.commit(next);
        }
    }

    pub(super) fn register(&mut self, node: usize) {
        self.heard[node] = self.now;
        let n = &mut self.nodes[node];
        let mut records = Vec::new();
        if std::mem::take(&mut n.emptied) {
            records = brokers::emptied(&self.image, node as i32);
        }
        let registration = registration(node as i32, n.started, n.directory);
        let after = self.image.apply(&records);
        records.extend(brokers::register(&after, &registration).expect("no other folder is about"));
        self.change(&records);
    }

    /// Takes in metadata that has come.
    pub(super) fn learn(&mut self, node: usize) -> Result<(), String> {
        while self.nodes[node].news.front().is_some_and(|(at, _)| *at <= self.now) {
            let Some((_, image)) = self.nodes[node].news.pop_front() else {
                break;
            };
            self.tell(|w| {
                let n = &w.nodes[node];
                format!(
                    "node {node}, log end {} high watermark {}, learns {image:?}",
                    n.log_end(),
                    n.high_watermark
                )
            });
            let now = self.now;
            let bug = self.bug;
            let min_insync = if bug == Bug::IgnoresMinInsync { 1 } else { MIN_INSYNC };
            let n = &mut self.nodes[node];
            let me = node as i32;
            if !image.replicas.contains(&me) {
                // What it has is removed.
                n.epoch = image.leader_epoch;
                lose_log(n);
                continue;
            }
            let same = std::mem::replace(&mut n.epoch, image.leader_epoch) == image.leader_epoch;
            if image.leader == me {
                if let (Role::Leads(leader), true) = (&mut n.role, same) {
                    leader.committed(&image, min_insync, now);
                    continue;
                }
                // What was appended as a follower is made durable first.
                n.durable = n.log.len();
                n.appends.clear();
                let mut leader = Leader::new(me, image.leader_epoch, n.log_end(), n.recall(), LAG_MS);
                leader.local(n.log_start, n.log_end(), n.durable as Offset);
                leader.committed(&image, min_insync, now);
                n.role = Role::Leads(leader);
                n.handover = Handover::at(now, HANDOVER_MS);
                n.checked = 0;
                self.outcome.elections += 1;
                if let Some(other) = self.leaders.insert(image.leader_epoch, node)
                    && other != node
                {
                    return Err(self.fail(format!("nodes {other} and {node} lead epoch {}", image.leader_epoch)));
                }
            } else if !matches!(n.role, Role::Follows(leader) if same && leader == image.leader) {
                n.role = Role::Follows(image.leader);
                if bug == Bug::TruncateToHighWatermark {
                    let to = n.high_watermark;
                    n.cut(to);
                }
            }
        }
        Ok(())
    }

    /// The controller fences who is silent, and who was fenced and is back registers again.
    pub(super) fn fence(&mut self) {
        for node in 0..self.nodes.len() {
            let id = node as i32;
            if self.image.is_active(id) && self.now - self.heard[node] > SESSION_MS {
                let records = brokers::fence(&self.image, id);
                self.change(&records);
            } else if !self.image.is_active(id) && self.active(node) && self.rng.chance(10) {
                self.register(node);
            }
        }
    }

    /// Asks the controller for a change that somebody waits for; false if nobody will say whether it was agreed on.
    pub(super) fn ask(&mut self, records: Vec<MetadataRecord>) -> bool {
        if self.faults && !records.is_empty() && self.rng.chance(4) {
            // Lost on the way, or its answer is, or it is agreed on when nobody expects it any more.
            if self.rng.chance(2) {
                let at = self.now + self.rng.below(250) as i64;
                self.late = Some((at, self.version, records));
            }
            return false;
        }
        self.change(&records);
        true
    }

    /// Agrees on what is late, unless something else was first.
    pub(super) fn agree_late(&mut self) {
        if let Some((at, version, records)) = self.late.take() {
            if at > self.now {
                self.late = Some((at, version, records));
            } else if version == self.version {
                self.change(&records);
            }
        }
    }

    /// Somebody wants other replicas, or the old ones after all.
    pub(super) fn reassign(&mut self) {
        let count = self.nodes.len() as u64;
        let mut replicas: Vec<i32> = (0..count as i32).collect();
        for i in 0..replicas.len() {
            replicas.swap(i, self.rng.below(count) as usize);
        }
        replicas.truncate(3);
        let wish = Wish {
            topic: TOPIC,
            partition: 0,
            replicas: (!self.rng.chance(4)).then_some(replicas),
        };
        if let Ok(record) = reassign::alter(&self.image, &wish) {
            self.change(record.as_slice());
        }
    }
}

/// A log, and all that is known of it, is gone.
pub(super) fn lose_log(node: &mut Node) {
    node.log.clear();
    node.epochs = EpochCache::default();
    node.producers = ProducerStates::default();
    node.durable = 0;
    node.high_watermark = 0;
    node.log_start = 0;
    node.starting = None;
    node.checked = 0;
    node.role = Role::None;
    node.appends.clear();
    node.coordinating = None;
}
