//! Members come, are given their assignments, and go: joins, rebalances, syncs, heartbeats, leaves.

use bytes::Bytes;

use super::{
    super::{
        GroupError,
        classic::{Group, GroupState, Member},
    },
    Caller, Coordinator, Join, Joined, Output, ReplyId, Synced, persist,
};

impl Coordinator {
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
        let old_leader = group.leader.clone().unwrap_or_default();
        if was_leader {
            group.leader = Some(new_id.clone());
        }
        group.members.insert(new_id.clone(), member);
        if group.state == GroupState::Stable && !changed {
            let mut answer = joined(group, &new_id, was_leader);
            if !join.knows_skip_assignment {
                // A leader would assign anew, which nobody would hear of: it is not told that it is one.
                answer.leader = old_leader;
                answer.members.clear();
                answer.skip_assignment = false;
            }
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

    pub(super) fn try_complete_join(&mut self, id: &str, now: i64) {
        let Some(group) = self.groups.get(id) else { return };
        if group.state == GroupState::PreparingRebalance && group.initial_delay_until.is_none() && group.all_joined() {
            self.complete_join(id, now);
        }
    }

    pub(super) fn complete_join(&mut self, id: &str, now: i64) {
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

    pub(super) fn remove_member(&mut self, id: &str, member_id: &str, now: i64) {
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
}

fn find_protocol(protocols: &[(String, Bytes)], name: &str) -> Bytes {
    protocols
        .iter()
        .find(|(n, _)| n == name)
        .map(|(_, m)| m.clone())
        .unwrap_or_default()
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
