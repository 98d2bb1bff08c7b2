//! All groups of a coordinator: what requests, time and loading do to them.
//!
//! Call order: any `join`, `sync`, … or [`tick`](Coordinator::tick); then drain [`poll_output`](Coordinator::poll_output)
//! (persist first, answer afterwards, in the order given); then sleep until
//! [`next_deadline`](Coordinator::next_deadline). Time is ms since 1970 and comes from the caller.

mod members;
mod offsets;

use std::collections::{BTreeSet, HashMap, VecDeque};

use bytes::Bytes;

use super::{
    GroupError,
    classic::{Group, GroupState},
    records::{self, GroupRecord},
};

/// A request that waits for its answer.
pub type ReplyId = u64;

/// Broker configuration that groups act on.
#[derive(Clone, Debug)]
pub struct GroupConfig {
    /// `group.min.session.timeout.ms`
    pub min_session_timeout_ms: i32,
    /// `group.max.session.timeout.ms`
    pub max_session_timeout_ms: i32,
    /// `group.initial.rebalance.delay.ms`
    pub initial_rebalance_delay_ms: i64,
    /// `group.max.size`
    pub max_size: usize,
    /// `offset.metadata.max.bytes`
    pub metadata_max_bytes: usize,
    /// `offsets.retention.minutes`, in ms
    pub offsets_retention_ms: i64,
}

/// A JoinGroup request.
#[derive(Clone, Debug)]
pub struct Join {
    /// Group.
    pub group: String,
    /// Empty the first time.
    pub member_id: String,
    /// Static membership.
    pub instance_id: Option<String>,
    /// As the client calls itself.
    pub client_id: String,
    /// Where it connects from.
    pub client_host: String,
    /// Session.
    pub session_timeout_ms: i32,
    /// Patience with the others.
    pub rebalance_timeout_ms: i32,
    /// `consumer`, …
    pub protocol_type: String,
    /// Preferred first.
    pub protocols: Vec<(String, Bytes)>,
    /// The version of the request asks for KIP-394.
    pub require_member_id: bool,
    /// The version of the request knows `skip_assignment` (KIP-814).
    pub knows_skip_assignment: bool,
    /// A new member id, drawn by the caller.
    pub new_member_id: String,
}

/// The answer to a JoinGroup.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Joined {
    /// Generation.
    pub generation: i32,
    /// Protocol in force.
    pub protocol_type: Option<String>,
    /// Protocol in force.
    pub protocol: Option<String>,
    /// Leader.
    pub leader: String,
    /// The member's id.
    pub member_id: String,
    /// For the leader: member id, instance id, subscription.
    pub members: Vec<(String, Option<String>, Bytes)>,
    /// The leader need not assign again (KIP-814).
    pub skip_assignment: bool,
}

/// The answer to a SyncGroup.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Synced {
    /// Protocol in force.
    pub protocol_type: Option<String>,
    /// Protocol in force.
    pub protocol: Option<String>,
    /// For the member.
    pub assignment: Bytes,
}

/// What the driver is to do.
#[derive(Clone, Debug)]
pub enum Output {
    /// Append to the group's partition of `__consumer_offsets`, durably, before the outputs that follow.
    Persist {
        /// Whose.
        group: String,
        /// Key and value of the record.
        records: Vec<(Bytes, Option<Bytes>)>,
    },
    /// Answer a JoinGroup.
    Joined(ReplyId, Result<Joined, (GroupError, String)>),
    /// Answer a SyncGroup.
    Synced(ReplyId, Result<Synced, GroupError>),
}

/// Who asks, in requests of members.
#[derive(Clone, Copy, Debug)]
pub struct Caller<'a> {
    /// Member id.
    pub member_id: &'a str,
    /// Static membership.
    pub instance_id: Option<&'a str>,
    /// Generation.
    pub generation: i32,
}

/// The state machine.
pub struct Coordinator {
    config: GroupConfig,
    groups: HashMap<String, Group>,
    /// When to look at a group again; stale entries are harmless.
    deadlines: BTreeSet<(i64, String)>,
    /// The earliest of a group's: a later one would add nothing, it is asked again then.
    armed: HashMap<String, i64>,
    outputs: VecDeque<Output>,
}

impl Coordinator {
    /// Without groups.
    #[must_use]
    pub fn new(config: GroupConfig) -> Self {
        Self {
            config,
            groups: HashMap::new(),
            deadlines: BTreeSet::new(),
            armed: HashMap::new(),
            outputs: VecDeque::new(),
        }
    }

    /// Takes in new settings; they hold from the next request.
    pub fn set_config(&mut self, config: GroupConfig) {
        self.config = config;
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`tick`](Self::tick) is due.
    #[must_use]
    pub fn next_deadline(&self) -> Option<i64> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// A group, to look at.
    #[must_use]
    pub fn group(&self, id: &str) -> Option<&Group> {
        self.groups.get(id)
    }

    /// All groups, in no order.
    pub fn groups(&self) -> impl Iterator<Item = &Group> {
        self.groups.values()
    }

    /// Ids of all groups, in no order.
    #[must_use]
    pub fn ids(&self) -> Vec<String> {
        self.groups.keys().cloned().collect()
    }

    /// Takes in a record of the log (loading).
    pub fn load(&mut self, record: GroupRecord, now: i64) {
        match record {
            GroupRecord::Offset {
                group,
                topic,
                partition,
                committed,
            } => match committed {
                Some(committed) => self
                    .groups
                    .entry(group.clone())
                    .or_insert_with(|| Group::new(group, now))
                    .offsets
                    .put(&topic, partition, committed),
                None => {
                    if let Some(g) = self.groups.get_mut(&group) {
                        g.offsets.remove(&topic, partition);
                    }
                }
            },
            GroupRecord::Group { group, state } => {
                let old = self.groups.remove(&group);
                if let Some(mut state) = state {
                    if let Some(old) = old {
                        state.offsets = old.offsets;
                    }
                    self.groups.insert(group, *state);
                } else if let Some(old) = old.filter(|g| !g.offsets.is_empty()) {
                    let mut empty = Group::new(group.clone(), now);
                    empty.offsets = old.offsets;
                    self.groups.insert(group, empty);
                }
            }
        }
    }

    /// Forgets groups, without a trace in the log: another coordinator has them now. Who waits is told to look for it.
    pub fn unload(&mut self, of: impl Fn(&str) -> bool) {
        let gone: Vec<Group> = self.groups.extract_if(|id, _| of(id)).map(|(_, g)| g).collect();
        // What they wanted persisted, that coordinator does not know; nor did anyone else.
        self.outputs
            .retain(|output| !matches!(output, Output::Persist { group, .. } if of(group)));
        for group in gone {
            for member in group.members.into_values() {
                if let Some(reply) = member.awaiting_join {
                    let answer = Err((GroupError::NotCoordinator, member.id.clone()));
                    self.outputs.push_back(Output::Joined(reply, answer));
                }
                if let Some(reply) = member.awaiting_sync {
                    self.outputs
                        .push_back(Output::Synced(reply, Err(GroupError::NotCoordinator)));
                }
            }
        }
    }

    /// Ends loading: sessions of loaded members begin now.
    pub fn loaded(&mut self, of: impl Fn(&str) -> bool, now: i64) {
        let ids: Vec<String> = self.groups.keys().filter(|id| of(id)).cloned().collect();
        for id in ids {
            if let Some(group) = self.groups.get_mut(&id) {
                for member in group.members.values_mut() {
                    member.session_deadline = now + i64::from(member.session_timeout_ms);
                }
            }
            self.arm(&id);
        }
    }

    /// All state as records, for a snapshot of the log.
    #[must_use]
    pub fn snapshot(&self, of: impl Fn(&str) -> bool) -> Vec<(Bytes, Option<Bytes>)> {
        let mut out = Vec::new();
        for group in self.groups.values().filter(|g| of(&g.id)) {
            if group.protocol_type.is_some() {
                out.push((records::group_key(&group.id), Some(records::group_value(group))));
            }
            for (topic, partition, committed) in group.offsets.iter() {
                out.push((
                    records::offset_key(&group.id, topic, partition),
                    Some(records::offset_value(committed)),
                ));
            }
        }
        out
    }

    fn arm(&mut self, id: &str) {
        let Some(group) = self.groups.get(id) else { return };
        let mut next = i64::MAX;
        match group.state {
            GroupState::PreparingRebalance => {
                next = next.min(group.initial_delay_until.unwrap_or(group.rebalance_deadline));
            }
            GroupState::CompletingRebalance => next = next.min(group.sync_deadline),
            GroupState::Empty | GroupState::Stable => {}
        }
        for member in group
            .members
            .values()
            .filter(|m| m.awaiting_join.is_none() && m.awaiting_sync.is_none())
        {
            next = next.min(member.session_deadline);
        }
        if let Some(lapse) = group.pending.values().min() {
            next = next.min(*lapse);
        }
        if next < self.armed.get(id).copied().unwrap_or(i64::MAX) {
            self.armed.insert(id.to_owned(), next);
            self.deadlines.insert((next, id.to_owned()));
        }
    }

    /// Lets time pass.
    pub fn tick(&mut self, now: i64) {
        while let Some((at, id)) = self.deadlines.first().cloned() {
            if at > now {
                break;
            }
            self.deadlines.pop_first();
            self.armed.remove(&id);
            self.tick_group(&id, now);
            self.arm(&id);
        }
    }

    fn tick_group(&mut self, id: &str, now: i64) {
        let Some(group) = self.groups.get_mut(id) else { return };
        group.pending.retain(|_, lapse| *lapse > now);
        let late_to_sync = group.state == GroupState::CompletingRebalance && group.sync_deadline <= now;
        let expired: Vec<String> = group
            .members
            .values()
            .filter(|m| {
                m.awaiting_join.is_none() && m.awaiting_sync.is_none() && (m.session_deadline <= now || late_to_sync)
            })
            .map(|m| m.id.clone())
            .collect();
        for member in expired {
            self.remove_member(id, &member, now);
        }
        let Some(group) = self.groups.get_mut(id) else { return };
        if group.state != GroupState::PreparingRebalance {
            return;
        }
        match group.initial_delay_until {
            Some(until) if until <= now => {
                let room = group.rebalance_deadline - now;
                if group.joined_during_delay && room > 0 {
                    // More members came: wait again, up to the rebalance timeout in all (KIP-134).
                    group.joined_during_delay = false;
                    group.initial_delay_until = Some(now + self.config.initial_rebalance_delay_ms.min(room));
                } else {
                    group.initial_delay_until = None;
                    self.complete_join(id, now);
                }
            }
            Some(_) => {}
            None if group.rebalance_deadline <= now => self.complete_join(id, now),
            None => self.try_complete_join(id, now),
        }
    }

    fn check_member(&self, id: &str, caller: Caller<'_>) -> Result<(), GroupError> {
        let group = self.groups.get(id).ok_or(GroupError::UnknownMember)?;
        if let Some(instance) = caller.instance_id {
            match group.instances.get(instance) {
                None => return Err(GroupError::UnknownMember),
                Some(holder) if holder != caller.member_id => return Err(GroupError::FencedInstance),
                Some(_) => {}
            }
        }
        if !group.members.contains_key(caller.member_id) {
            return Err(GroupError::UnknownMember);
        }
        if caller.generation != group.generation {
            return Err(GroupError::IllegalGeneration);
        }
        Ok(())
    }
}

fn persist(group: &Group) -> Output {
    Output::Persist {
        group: group.id.clone(),
        records: vec![(records::group_key(&group.id), Some(records::group_value(group)))],
    }
}
