//! All groups of a coordinator: what requests, time and loading do to them.
//!
//! Call order: any `join`, `sync`, … or [`tick`](Coordinator::tick); then drain [`poll_output`](Coordinator::poll_output)
//! (persist first, answer afterwards, in the order given); then sleep until
//! [`next_deadline`](Coordinator::next_deadline). Time is ms since 1970 and comes from the caller.

use std::collections::{BTreeSet, HashMap, VecDeque};

use bytes::Bytes;

use super::{
    GroupError,
    classic::{Group, GroupState, Member},
    offsets::Committed,
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

    /// Ends loading: sessions of loaded members begin now.
    pub fn loaded(&mut self, now: i64) {
        let ids: Vec<String> = self.groups.keys().cloned().collect();
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
        if next < i64::MAX {
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

    /// JoinGroup. The answer comes as an output.
    pub fn join(&mut self, reply: ReplyId, join: Join, now: i64) {
        let id = join.group.clone();
        let member_id = join.member_id.clone();
        if let Err((error, member_id)) = self.join_inner(reply, join, now).map_err(|e| match e {
            (error, None) => (error, member_id),
            (error, Some(given)) => (error, given),
        }) {
            self.outputs.push_back(Output::Joined(reply, Err((error, member_id))));
        }
        self.arm(&id);
    }

    fn join_inner(&mut self, reply: ReplyId, join: Join, now: i64) -> Result<(), (GroupError, Option<String>)> {
        let refuse = |error| Err((error, None));
        if join.group.is_empty() {
            return refuse(GroupError::InvalidGroupId);
        }
        if join.session_timeout_ms < self.config.min_session_timeout_ms
            || join.session_timeout_ms > self.config.max_session_timeout_ms
        {
            return refuse(GroupError::InvalidSessionTimeout);
        }
        if join.protocol_type.is_empty() || join.protocols.is_empty() {
            return refuse(GroupError::InconsistentProtocol);
        }
        if !self.groups.contains_key(&join.group) {
            if !join.member_id.is_empty() {
                return refuse(GroupError::UnknownMember);
            }
            self.groups
                .insert(join.group.clone(), Group::new(join.group.clone(), now));
        }
        let max_size = self.config.max_size;
        let Some(group) = self.groups.get_mut(&join.group) else {
            return refuse(GroupError::GroupNotFound);
        };
        if !group.supports(&join.member_id, &join.protocol_type, &join.protocols) {
            return refuse(GroupError::InconsistentProtocol);
        }
        let known = group.members.contains_key(&join.member_id);
        if !known && group.members.len() >= max_size {
            return refuse(GroupError::GroupFull);
        }
        if join.member_id.is_empty() {
            return self.join_as_new(reply, join, now);
        }
        if group.pending.remove(&join.member_id).is_some() {
            let id = join.member_id.clone();
            self.add_member(reply, join, id, now);
            return Ok(());
        }
        if let Some(instance) = &join.instance_id {
            match group.instances.get(instance) {
                None => return refuse(GroupError::UnknownMember),
                Some(holder) if *holder != join.member_id => return refuse(GroupError::FencedInstance),
                Some(_) => {}
            }
        }
        if !known {
            return refuse(GroupError::UnknownMember);
        }
        self.rejoin(reply, join, now);
        Ok(())
    }

    fn join_as_new(&mut self, reply: ReplyId, join: Join, now: i64) -> Result<(), (GroupError, Option<String>)> {
        let Some(group) = self.groups.get_mut(&join.group) else {
            return Err((GroupError::GroupNotFound, None));
        };
        let new_id = join.new_member_id.clone();
        if let Some(instance) = &join.instance_id {
            match group.instances.get(instance).cloned() {
                Some(old_id) => self.replace_static(reply, join, &old_id, new_id, now),
                None => self.add_member(reply, join, new_id, now),
            }
            return Ok(());
        }
        if join.require_member_id {
            // Until it joins with the id, it holds a rebalance up no longer than its session (KIP-394).
            group
                .pending
                .insert(new_id.clone(), now + i64::from(join.session_timeout_ms));
            return Err((GroupError::MemberIdRequired, Some(new_id)));
        }
        self.add_member(reply, join, new_id, now);
        Ok(())
    }

    fn add_member(&mut self, reply: ReplyId, join: Join, id: String, now: i64) {
        let Some(group) = self.groups.get_mut(&join.group) else {
            return;
        };
        if group.members.is_empty() {
            group.protocol_type = Some(join.protocol_type.clone());
        }
        if group.leader.is_none() {
            group.leader = Some(id.clone());
        }
        if let Some(instance) = &join.instance_id {
            group.instances.insert(instance.clone(), id.clone());
        }
        group.members.insert(
            id.clone(),
            Member {
                id,
                instance_id: join.instance_id,
                client_id: join.client_id,
                client_host: join.client_host,
                session_timeout_ms: join.session_timeout_ms,
                rebalance_timeout_ms: join.rebalance_timeout_ms,
                protocols: join.protocols,
                assignment: Bytes::new(),
                awaiting_join: Some(reply),
                awaiting_sync: None,
                session_deadline: now + i64::from(join.session_timeout_ms),
            },
        );
        group.joined_during_delay = true;
        self.prepare_rebalance(&join.group, now);
    }

    /// A static member is back under a new member id (KIP-345). If nothing it says has changed, the group goes on.
    fn replace_static(&mut self, reply: ReplyId, join: Join, old_id: &str, new_id: String, now: i64) {
        let id = join.group.clone();
        let Some(group) = self.groups.get_mut(&id) else { return };
        let Some(mut member) = group.members.remove(old_id) else {
            return;
        };
        if let Some(waiting) = member.awaiting_join.take() {
            self.outputs.push_back(Output::Joined(
                waiting,
                Err((GroupError::FencedInstance, old_id.to_owned())),
            ));
        }
        if let Some(waiting) = member.awaiting_sync.take() {
            self.outputs
                .push_back(Output::Synced(waiting, Err(GroupError::FencedInstance)));
        }
        let changed = group
            .protocol
            .as_deref()
            .is_none_or(|p| member.metadata(p) != find_protocol(&join.protocols, p));
        member.id.clone_from(&new_id);
        member.client_id = join.client_id;
        member.client_host = join.client_host;
        member.session_timeout_ms = join.session_timeout_ms;
        member.rebalance_timeout_ms = join.rebalance_timeout_ms;
        member.protocols = join.protocols;
        member.session_deadline = now + i64::from(join.session_timeout_ms);
        if let Some(instance) = &member.instance_id {
            group.instances.insert(instance.clone(), new_id.clone());
        }
        let was_leader = group.leader.as_deref() == Some(old_id);
        if was_leader {
            group.leader = Some(new_id.clone());
        }
        group.members.insert(new_id.clone(), member);
        if group.state == GroupState::Stable && !changed {
            let answer = joined(group, &new_id, was_leader);
            let record = persist(group);
            self.outputs.push_back(record);
            self.outputs.push_back(Output::Joined(reply, Ok(answer)));
            return;
        }
        if let Some(member) = group.members.get_mut(&new_id) {
            member.awaiting_join = Some(reply);
        }
        self.prepare_rebalance(&id, now);
    }

    fn rejoin(&mut self, reply: ReplyId, join: Join, now: i64) {
        let id = join.group.clone();
        let Some(group) = self.groups.get_mut(&id) else { return };
        let is_leader = group.leader.as_deref() == Some(join.member_id.as_str());
        let state = group.state;
        let Some(member) = group.members.get_mut(&join.member_id) else {
            return;
        };
        let same = member.protocols == join.protocols;
        member.session_deadline = now + i64::from(join.session_timeout_ms);
        let answer_at_once = same
            && match state {
                // It did not get our answer, it seems: repeat it.
                GroupState::CompletingRebalance => true,
                GroupState::Stable => !is_leader,
                GroupState::Empty | GroupState::PreparingRebalance => false,
            };
        if answer_at_once {
            let answer = joined(group, &join.member_id, false);
            self.outputs.push_back(Output::Joined(reply, Ok(answer)));
            return;
        }
        member.client_id = join.client_id;
        member.client_host = join.client_host;
        member.session_timeout_ms = join.session_timeout_ms;
        member.rebalance_timeout_ms = join.rebalance_timeout_ms;
        member.protocols = join.protocols;
        if let Some(older) = member.awaiting_join.replace(reply) {
            self.outputs
                .push_back(Output::Joined(older, Err((GroupError::UnknownMember, join.member_id))));
        }
        self.prepare_rebalance(&id, now);
    }

    fn prepare_rebalance(&mut self, id: &str, now: i64) {
        let delay = self.config.initial_rebalance_delay_ms;
        let Some(group) = self.groups.get_mut(id) else { return };
        match group.state {
            GroupState::PreparingRebalance => {}
            GroupState::Empty => {
                let timeout = group.rebalance_timeout_ms();
                group.rebalance_deadline = now + timeout;
                group.initial_delay_until = (delay > 0).then(|| now + delay.min(timeout));
                group.joined_during_delay = false;
                group.enter(GroupState::PreparingRebalance, now);
            }
            GroupState::Stable | GroupState::CompletingRebalance => {
                for member in group.members.values_mut() {
                    if let Some(waiting) = member.awaiting_sync.take() {
                        self.outputs
                            .push_back(Output::Synced(waiting, Err(GroupError::RebalanceInProgress)));
                    }
                    if group.state == GroupState::CompletingRebalance {
                        member.assignment = Bytes::new();
                    }
                }
                group.rebalance_deadline = now + group.rebalance_timeout_ms();
                group.initial_delay_until = None;
                group.enter(GroupState::PreparingRebalance, now);
            }
        }
        self.try_complete_join(id, now);
    }

    fn try_complete_join(&mut self, id: &str, now: i64) {
        let Some(group) = self.groups.get(id) else { return };
        if group.state == GroupState::PreparingRebalance && group.initial_delay_until.is_none() && group.all_joined() {
            self.complete_join(id, now);
        }
    }

    fn complete_join(&mut self, id: &str, now: i64) {
        let Some(group) = self.groups.get_mut(id) else { return };
        // Dynamic members that did not come back are out; static ones keep their place until their session ends.
        let gone: Vec<String> = group
            .members
            .values()
            .filter(|m| m.awaiting_join.is_none() && m.instance_id.is_none())
            .map(|m| m.id.clone())
            .collect();
        for member in gone {
            group.members.remove(&member);
        }
        if !group.members.is_empty() && group.members.values().all(|m| m.awaiting_join.is_none()) {
            // Only static members, none of them here: nobody could assign. Wait on.
            group.rebalance_deadline = now + group.rebalance_timeout_ms();
            return;
        }
        group.generation += 1;
        group.pending.retain(|_, lapse| *lapse > now);
        if group.members.is_empty() {
            group.leader = None;
            group.protocol = None;
            group.enter(GroupState::Empty, now);
            let record = persist(group);
            self.outputs.push_back(record);
            return;
        }
        let leader_here = group
            .leader
            .as_ref()
            .and_then(|l| group.members.get(l))
            .is_some_and(|m| m.awaiting_join.is_some());
        if !leader_here {
            group.leader = group
                .members
                .values()
                .find(|m| m.awaiting_join.is_some())
                .map(|m| m.id.clone());
        }
        group.protocol = group.vote();
        group.sync_deadline = now + group.rebalance_timeout_ms();
        group.enter(GroupState::CompletingRebalance, now);
        let ids: Vec<String> = group.members.keys().cloned().collect();
        for member_id in ids {
            let answer = joined(group, &member_id, false);
            if let Some(member) = group.members.get_mut(&member_id) {
                member.session_deadline = now + i64::from(member.session_timeout_ms);
                if let Some(reply) = member.awaiting_join.take() {
                    self.outputs.push_back(Output::Joined(reply, Ok(answer)));
                }
            }
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

    /// SyncGroup. The answer comes as an output.
    pub fn sync(
        &mut self,
        reply: ReplyId,
        id: &str,
        caller: Caller<'_>,
        protocol: (Option<&str>, Option<&str>),
        assignments: Vec<(String, Bytes)>,
        now: i64,
    ) {
        if let Err(error) = self.sync_inner(reply, id, caller, protocol, assignments, now) {
            self.outputs.push_back(Output::Synced(reply, Err(error)));
        }
        self.arm(id);
    }

    fn sync_inner(
        &mut self,
        reply: ReplyId,
        id: &str,
        caller: Caller<'_>,
        (protocol_type, protocol): (Option<&str>, Option<&str>),
        assignments: Vec<(String, Bytes)>,
        now: i64,
    ) -> Result<(), GroupError> {
        if id.is_empty() {
            return Err(GroupError::InvalidGroupId);
        }
        self.check_member(id, caller)?;
        let group = self.groups.get_mut(id).ok_or(GroupError::UnknownMember)?;
        let differs = |given: Option<&str>, held: &Option<String>| given.is_some_and(|g| Some(g) != held.as_deref());
        if differs(protocol_type, &group.protocol_type) || differs(protocol, &group.protocol) {
            return Err(GroupError::InconsistentProtocol);
        }
        match group.state {
            GroupState::Empty => return Err(GroupError::UnknownMember),
            GroupState::PreparingRebalance => return Err(GroupError::RebalanceInProgress),
            GroupState::Stable => {
                let member = group
                    .members
                    .get_mut(caller.member_id)
                    .ok_or(GroupError::UnknownMember)?;
                member.session_deadline = now + i64::from(member.session_timeout_ms);
                let assignment = member.assignment.clone();
                let answer = synced(group, assignment);
                self.outputs.push_back(Output::Synced(reply, Ok(answer)));
                return Ok(());
            }
            GroupState::CompletingRebalance => {}
        }
        if let Some(member) = group.members.get_mut(caller.member_id)
            && let Some(older) = member.awaiting_sync.replace(reply)
        {
            self.outputs
                .push_back(Output::Synced(older, Err(GroupError::RebalanceInProgress)));
        }
        if group.leader.as_deref() != Some(caller.member_id) {
            return Ok(());
        }
        for member in group.members.values_mut() {
            member.assignment = Bytes::new();
        }
        for (member_id, assignment) in assignments {
            if let Some(member) = group.members.get_mut(&member_id) {
                member.assignment = assignment;
            }
        }
        group.enter(GroupState::Stable, now);
        group.sync_deadline = i64::MAX;
        let record = persist(group);
        self.outputs.push_back(record);
        let mut answers = Vec::new();
        for member in group.members.values_mut() {
            if let Some(waiting) = member.awaiting_sync.take() {
                member.session_deadline = now + i64::from(member.session_timeout_ms);
                answers.push((waiting, member.assignment.clone()));
            }
        }
        for (waiting, assignment) in answers {
            let answer = synced(group, assignment);
            self.outputs.push_back(Output::Synced(waiting, Ok(answer)));
        }
        Ok(())
    }

    /// Heartbeat.
    ///
    /// # Errors
    /// [`GroupError`]; `RebalanceInProgress` asks the member to join again.
    pub fn heartbeat(&mut self, id: &str, caller: Caller<'_>, now: i64) -> Result<(), GroupError> {
        if id.is_empty() {
            return Err(GroupError::InvalidGroupId);
        }
        self.check_member(id, caller)?;
        let group = self.groups.get_mut(id).ok_or(GroupError::UnknownMember)?;
        if let Some(member) = group.members.get_mut(caller.member_id) {
            member.session_deadline = now + i64::from(member.session_timeout_ms);
        }
        match group.state {
            GroupState::Empty => Err(GroupError::UnknownMember),
            GroupState::PreparingRebalance => Err(GroupError::RebalanceInProgress),
            GroupState::CompletingRebalance | GroupState::Stable => Ok(()),
        }
    }

    /// LeaveGroup of one member, by member id or (static) by instance id.
    ///
    /// # Errors
    /// [`GroupError`].
    pub fn leave(&mut self, id: &str, member_id: &str, instance_id: Option<&str>, now: i64) -> Result<(), GroupError> {
        let group = self.groups.get_mut(id).ok_or(GroupError::UnknownMember)?;
        let member_id = match instance_id {
            Some(instance) => {
                let holder = group.instances.get(instance).ok_or(GroupError::UnknownMember)?;
                if !member_id.is_empty() && holder != member_id {
                    return Err(GroupError::FencedInstance);
                }
                holder.clone()
            }
            None => member_id.to_owned(),
        };
        if group.pending.remove(&member_id).is_some() {
            self.try_complete_join(id, now);
        } else if group.members.contains_key(&member_id) {
            self.remove_member(id, &member_id, now);
        } else {
            return Err(GroupError::UnknownMember);
        }
        self.arm(id);
        Ok(())
    }

    fn remove_member(&mut self, id: &str, member_id: &str, now: i64) {
        let Some(group) = self.groups.get_mut(id) else { return };
        let Some(member) = group.members.remove(member_id) else {
            return;
        };
        if let Some(instance) = &member.instance_id {
            group.instances.remove(instance);
        }
        if let Some(waiting) = member.awaiting_join {
            self.outputs.push_back(Output::Joined(
                waiting,
                Err((GroupError::UnknownMember, member_id.to_owned())),
            ));
        }
        if let Some(waiting) = member.awaiting_sync {
            self.outputs
                .push_back(Output::Synced(waiting, Err(GroupError::UnknownMember)));
        }
        if group.leader.as_deref() == Some(member_id) {
            group.leader = group.members.keys().next().cloned();
        }
        match group.state {
            GroupState::Empty => {}
            GroupState::PreparingRebalance => self.try_complete_join(id, now),
            GroupState::CompletingRebalance | GroupState::Stable => self.prepare_rebalance(id, now),
        }
    }

    /// Whether a commit is allowed; [`committed`](Self::committed) is called when it is durable.
    ///
    /// # Errors
    /// [`GroupError`].
    pub fn check_commit(&mut self, id: &str, caller: Caller<'_>, now: i64) -> Result<(), GroupError> {
        if id.is_empty() {
            return Err(GroupError::InvalidGroupId);
        }
        let Some(group) = self.groups.get_mut(id) else {
            return if caller.generation < 0 {
                self.groups.insert(id.to_owned(), Group::new(id.to_owned(), now));
                Ok(())
            } else {
                Err(GroupError::IllegalGeneration)
            };
        };
        if caller.generation < 0 && caller.member_id.is_empty() && group.state == GroupState::Empty {
            return Ok(());
        }
        self.check_member(id, caller)?;
        let group = self.groups.get_mut(id).ok_or(GroupError::UnknownMember)?;
        if group.state == GroupState::CompletingRebalance {
            return Err(GroupError::RebalanceInProgress);
        }
        if let Some(member) = group.members.get_mut(caller.member_id) {
            member.session_deadline = now + i64::from(member.session_timeout_ms);
        }
        Ok(())
    }

    /// Whether commit metadata is short enough.
    ///
    /// # Errors
    /// [`GroupError::MetadataTooLarge`].
    pub fn check_metadata(&self, metadata: &str) -> Result<(), GroupError> {
        if metadata.len() > self.config.metadata_max_bytes {
            return Err(GroupError::MetadataTooLarge);
        }
        Ok(())
    }

    /// A commit is durable.
    pub fn committed(&mut self, id: &str, topic: &str, partition: i32, committed: Committed, now: i64) {
        self.groups
            .entry(id.to_owned())
            .or_insert_with(|| Group::new(id.to_owned(), now))
            .offsets
            .put(topic, partition, committed);
    }

    /// Deletes a group without members, with its offsets.
    ///
    /// # Errors
    /// [`GroupError::NonEmptyGroup`], [`GroupError::GroupNotFound`].
    pub fn delete(&mut self, id: &str) -> Result<(), GroupError> {
        if id.is_empty() {
            return Err(GroupError::InvalidGroupId);
        }
        let group = self.groups.get(id).ok_or(GroupError::GroupNotFound)?;
        if group.state != GroupState::Empty {
            return Err(GroupError::NonEmptyGroup);
        }
        self.remove_group(id);
        Ok(())
    }

    fn remove_group(&mut self, id: &str) {
        let Some(group) = self.groups.remove(id) else { return };
        let mut tombstones: Vec<(Bytes, Option<Bytes>)> = group
            .offsets
            .iter()
            .map(|(topic, partition, _)| (records::offset_key(id, topic, partition), None))
            .collect();
        tombstones.push((records::group_key(id), None));
        self.outputs.push_back(Output::Persist {
            group: id.to_owned(),
            records: tombstones,
        });
    }

    /// Deletes single offsets; each partition is answered by itself.
    ///
    /// # Errors
    /// [`GroupError`] for the whole request.
    pub fn delete_offsets(
        &mut self,
        id: &str,
        partitions: &[(String, i32)],
    ) -> Result<Vec<Result<(), GroupError>>, GroupError> {
        let group = self.groups.get_mut(id).ok_or(GroupError::GroupNotFound)?;
        let subscribed = group.subscribed_topics();
        if group.state != GroupState::Empty && subscribed.is_none() {
            return Err(GroupError::NonEmptyGroup);
        }
        let subscribed = if group.state == GroupState::Empty {
            None
        } else {
            subscribed
        };
        let mut tombstones = Vec::new();
        let results = partitions
            .iter()
            .map(|(topic, partition)| {
                if subscribed.as_ref().is_some_and(|s| s.contains(topic)) {
                    return Err(GroupError::SubscribedToTopic);
                }
                if group.offsets.remove(topic, *partition).is_some() {
                    tombstones.push((records::offset_key(id, topic, *partition), None));
                }
                Ok(())
            })
            .collect();
        if !tombstones.is_empty() {
            self.outputs.push_back(Output::Persist {
                group: id.to_owned(),
                records: tombstones,
            });
        }
        Ok(results)
    }

    /// Forgets offsets of a topic that was deleted.
    pub fn topic_deleted(&mut self, topic: &str) {
        for group in self.groups.values_mut() {
            let gone: Vec<i32> = group
                .offsets
                .iter()
                .filter(|(t, _, _)| *t == topic)
                .map(|(_, p, _)| p)
                .collect();
            if gone.is_empty() {
                continue;
            }
            let records = gone
                .into_iter()
                .map(|p| {
                    group.offsets.remove(topic, p);
                    (records::offset_key(&group.id, topic, p), None)
                })
                .collect();
            self.outputs.push_back(Output::Persist {
                group: group.id.clone(),
                records,
            });
        }
    }

    /// Forgets offsets that are older than `offsets.retention.minutes` in groups without members (KIP-211), and
    /// groups that have nothing left.
    pub fn expire_offsets(&mut self, now: i64) {
        let retention = self.config.offsets_retention_ms;
        let mut empty = Vec::new();
        for group in self
            .groups
            .values_mut()
            .filter(|g| g.state == GroupState::Empty && g.pending.is_empty())
        {
            let standalone = group.protocol_type.is_none();
            let expired: Vec<(String, i32)> = group
                .offsets
                .iter()
                .filter(|(_, _, c)| {
                    let since = if standalone {
                        c.commit_ms
                    } else {
                        c.commit_ms.max(group.state_since)
                    };
                    now - since >= retention
                })
                .map(|(t, p, _)| (t.to_owned(), p))
                .collect();
            if !expired.is_empty() {
                let records = expired
                    .iter()
                    .map(|(topic, p)| {
                        group.offsets.remove(topic, *p);
                        (records::offset_key(&group.id, topic, *p), None)
                    })
                    .collect();
                self.outputs.push_back(Output::Persist {
                    group: group.id.clone(),
                    records,
                });
            }
            if group.offsets.is_empty() && now - group.state_since >= retention.min(60_000) {
                empty.push(group.id.clone());
            }
        }
        for id in empty {
            self.remove_group(&id);
        }
    }
}

fn find_protocol(protocols: &[(String, Bytes)], name: &str) -> Bytes {
    protocols
        .iter()
        .find(|(n, _)| n == name)
        .map(|(_, m)| m.clone())
        .unwrap_or_default()
}

fn persist(group: &Group) -> Output {
    Output::Persist {
        group: group.id.clone(),
        records: vec![(records::group_key(&group.id), Some(records::group_value(group)))],
    }
}

fn synced(group: &Group, assignment: Bytes) -> Synced {
    Synced {
        protocol_type: group.protocol_type.clone(),
        protocol: group.protocol.clone(),
        assignment,
    }
}

fn joined(group: &Group, member_id: &str, skip_assignment: bool) -> Joined {
    let leader = group.leader.clone().unwrap_or_default();
    let protocol = group.protocol.as_deref().unwrap_or("");
    let members = if leader == member_id {
        group
            .members
            .values()
            .map(|m| (m.id.clone(), m.instance_id.clone(), m.metadata(protocol)))
            .collect()
    } else {
        Vec::new()
    };
    Joined {
        generation: group.generation,
        protocol_type: group.protocol_type.clone(),
        protocol: group.protocol.clone(),
        leader,
        member_id: member_id.to_owned(),
        members,
        skip_assignment,
    }
}
