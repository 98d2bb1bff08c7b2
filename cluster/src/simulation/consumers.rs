//! The consumers of a world: members of one group that join, assign, beat and commit as Kafka's clients do.

use bytes::Bytes;

use super::{
    World,
    groups::{GROUP, MEMBER_SESSION_MS, PARTITIONS},
};
use crate::group::{
    GroupError, ReplyId,
    coordinator::{Caller, Join, Joined, Synced},
};

/// Patience with an answer, ms.
const ANSWER_MS: i64 = 400;
const HEARTBEAT_MS: i64 = 30;

#[derive(Default)]
enum Stage {
    /// It is to join.
    #[default]
    Out,
    /// A JoinGroup or SyncGroup waits for its answer.
    Waits { reply: ReplyId, until: i64 },
    /// It consumes these.
    In(Vec<i32>),
}

/// A member, or who wants to be one.
#[derive(Default)]
pub(super) struct Consumer {
    /// Whom it takes for the coordinator.
    coordinator: usize,
    member_id: String,
    generation: i32,
    stage: Stage,
    /// Nothing is done before.
    next: i64,
}

impl World {
    pub(super) fn consume(&mut self, consumer: usize) {
        let now = self.now;
        if self.faults && self.rng.chance(2_000) {
            let pause = self.rng.below(600) as i64;
            let restarts = self.rng.chance(2);
            let c = &mut self.groups.consumers[consumer];
            c.next = now + pause;
            if restarts {
                (c.member_id, c.stage) = (String::new(), Stage::Out);
            }
        }
        let c = &mut self.groups.consumers[consumer];
        if c.next > now {
            return;
        }
        let node = c.coordinator;
        match &c.stage {
            Stage::Waits { until, .. } if *until > now => {}
            Stage::Waits { .. } => self.look_elsewhere(consumer, true),
            Stage::Out => self.join(consumer, node),
            Stage::In(partitions) => {
                let partitions = partitions.clone();
                c.next = now + HEARTBEAT_MS;
                let (member, generation) = (c.member_id.clone(), c.generation);
                if !partitions.is_empty() && self.rng.chance(2) {
                    let partition = partitions[self.rng.below(partitions.len() as u64) as usize];
                    if !self.commit_offset(node, &member, generation, partition) {
                        return self.rejoin(consumer, false);
                    }
                }
                let caller = Caller {
                    member_id: &member,
                    instance_id: None,
                    generation,
                };
                match self.coordinator(node).map(|state| state.heartbeat(GROUP, caller, now)) {
                    Some(Ok(())) => {}
                    Some(Err(error)) => self.rejoin(consumer, error == GroupError::UnknownMember),
                    None => self.look_elsewhere(consumer, false),
                }
            }
        }
    }

    /// Its coordinator does not answer, or is none.
    fn look_elsewhere(&mut self, consumer: usize, rejoins: bool) {
        let coordinator = self.rng.below(self.nodes.len() as u64) as usize;
        let now = self.now;
        let c = &mut self.groups.consumers[consumer];
        c.coordinator = coordinator;
        c.next = now + 5;
        if rejoins {
            c.stage = Stage::Out;
        }
    }

    fn rejoin(&mut self, consumer: usize, anew: bool) {
        let c = &mut self.groups.consumers[consumer];
        c.stage = Stage::Out;
        if anew {
            c.member_id.clear();
        }
    }

    fn join(&mut self, consumer: usize, node: usize) {
        let now = self.now;
        if self.coordinator(node).is_none() {
            return self.look_elsewhere(consumer, true);
        }
        let (reply, id) = (self.groups.id(), self.groups.id());
        let c = &mut self.groups.consumers[consumer];
        let join = Join {
            group: GROUP.into(),
            member_id: c.member_id.clone(),
            instance_id: None,
            client_id: String::new(),
            client_host: String::new(),
            session_timeout_ms: MEMBER_SESSION_MS,
            rebalance_timeout_ms: 300,
            protocol_type: "consumer".into(),
            protocols: vec![("range".into(), Bytes::new())],
            require_member_id: true,
            knows_skip_assignment: true,
            new_member_id: format!("member-{id:06}"),
        };
        c.stage = Stage::Waits {
            reply,
            until: now + ANSWER_MS,
        };
        if let Some(state) = self.coordinator(node) {
            state.join(reply, join, now);
        }
    }

    /// Whose answer this is, if he still waits and it is not lost on the way.
    fn awaited(&mut self, reply: ReplyId) -> Option<usize> {
        let is_lost = self.faults && self.rng.chance(30);
        let mut consumers = self.groups.consumers.iter();
        let whose = consumers.position(|c| matches!(c.stage, Stage::Waits { reply: r, .. } if r == reply));
        whose.filter(|_| !is_lost)
    }

    pub(super) fn joined(&mut self, reply: ReplyId, answer: Result<Joined, (GroupError, String)>) {
        let Some(consumer) = self.awaited(reply) else { return };
        match answer {
            Ok(joined) => {
                let mut assignments = Vec::new();
                for (n, (member, ..)) in joined.members.iter().enumerate() {
                    let theirs = (0..PARTITIONS).filter(|p| *p as usize % joined.members.len() == n);
                    assignments.push((member.clone(), theirs.map(|p| p as u8).collect::<Bytes>()));
                }
                let c = &mut self.groups.consumers[consumer];
                (c.member_id, c.generation) = (joined.member_id, joined.generation);
                self.sync(consumer, assignments);
            }
            Err((GroupError::MemberIdRequired, id)) => {
                self.groups.consumers[consumer].member_id = id;
                self.rejoin(consumer, false);
            }
            Err((GroupError::NotCoordinator, _)) => self.look_elsewhere(consumer, true),
            Err((error, _)) => self.rejoin(consumer, error == GroupError::UnknownMember),
        }
    }

    fn sync(&mut self, consumer: usize, assignments: Vec<(String, Bytes)>) {
        let (now, reply) = (self.now, self.groups.id());
        let c = &mut self.groups.consumers[consumer];
        c.stage = Stage::Waits {
            reply,
            until: now + ANSWER_MS,
        };
        let (node, member, generation) = (c.coordinator, c.member_id.clone(), c.generation);
        let caller = Caller {
            member_id: &member,
            instance_id: None,
            generation,
        };
        if let Some(state) = self.coordinator(node) {
            state.sync(reply, GROUP, caller, (None, None), assignments, now);
        }
    }

    pub(super) fn synced(&mut self, reply: ReplyId, answer: Result<Synced, GroupError>) {
        let Some(consumer) = self.awaited(reply) else { return };
        match answer {
            Ok(synced) => {
                let partitions = synced.assignment.iter().map(|p| i32::from(*p)).collect();
                self.groups.consumers[consumer].stage = Stage::In(partitions);
            }
            Err(GroupError::NotCoordinator) => self.look_elsewhere(consumer, true),
            Err(error) => self.rejoin(consumer, error == GroupError::UnknownMember),
        }
    }

    /// Why the group is not as it should be when nothing disturbs it any more.
    pub(super) fn group_unsettled(&self) -> Option<String> {
        let mut consumed: Vec<i32> = Vec::new();
        for c in &self.groups.consumers {
            match &c.stage {
                Stage::In(partitions) => consumed.extend(partitions),
                _ => return Some(format!("consumer {:?} is in no group", c.member_id)),
            }
        }
        consumed.sort_unstable();
        if consumed != (0..PARTITIONS).collect::<Vec<_>>() {
            return Some(format!("consumed are {consumed:?}"));
        }
        (self.now - self.groups.changed < 1_000).then(|| format!("the group changed at {} ms", self.groups.changed))
    }
}
