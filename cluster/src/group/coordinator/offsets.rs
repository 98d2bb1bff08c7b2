//! Committed offsets of all groups, and the end of groups.

use bytes::Bytes;

use super::{
    super::{
        GroupError,
        classic::{Group, GroupState},
        offsets::Committed,
        records,
    },
    Caller, Coordinator, Output,
};

impl Coordinator {
    /// Whether a commit is allowed; [`committed`](Self::committed) is called when it is durable. Whoever states no generation belongs
    /// to no member, whatever else he states, and may commit for a group that has none. The empty id is that of a group like any other,
    /// for commits alone: clients without a `group.id` have it.
    ///
    /// # Errors
    /// [`GroupError`]; [`GroupError::GroupNotFound`] if a generation is stated of a group that is not there.
    pub fn check_commit(&mut self, id: &str, caller: Caller<'_>, now: i64) -> Result<(), GroupError> {
        let Some(group) = self.groups.get_mut(id) else {
            return if caller.generation < 0 {
                self.groups.insert(id.to_owned(), Group::new(id.to_owned(), now));
                Ok(())
            } else {
                Err(GroupError::GroupNotFound)
            };
        };
        if caller.generation < 0 && group.state == GroupState::Empty {
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
        let group = self.groups.get(id).ok_or(GroupError::GroupNotFound)?;
        if group.state != GroupState::Empty {
            return Err(GroupError::NonEmptyGroup);
        }
        self.remove_group(id);
        Ok(())
    }

    pub(super) fn remove_group(&mut self, id: &str) {
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
        if id.is_empty() {
            return Err(GroupError::InvalidGroupId);
        }
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
            self.outputs.extend(forget(group, |t, _| t == topic));
        }
    }

    /// Forgets offsets that are older than `offsets.retention.minutes` in groups without members, and in stable groups of
    /// consumers those of topics that no member subscribes to any more (KIP-211); forgets groups that have nothing left. Of these groups:
    /// a node may coordinate so many that looking at all takes long.
    pub fn expire_offsets(&mut self, ids: &[String], now: i64) {
        let retention = self.config.offsets_retention_ms;
        let mut empty = Vec::new();
        for id in ids {
            let Some(group) = self.groups.get_mut(id) else { continue };
            let standalone = group.protocol_type.is_none();
            let subscribed = match group.state {
                GroupState::Empty if group.pending.is_empty() => None,
                GroupState::Stable => match group.subscribed_topics() {
                    Some(topics) => Some(topics),
                    None => continue,
                },
                _ => continue,
            };
            let state_since = group.state_since;
            self.outputs.extend(forget(group, |topic, committed| {
                if subscribed.as_ref().is_some_and(|s| s.contains(topic)) {
                    return false;
                }
                let since = if standalone || subscribed.is_some() {
                    committed.commit_ms
                } else {
                    committed.commit_ms.max(state_since)
                };
                now - since >= retention
            }));
            if subscribed.is_none() && group.offsets.is_empty() && now - group.state_since >= retention.min(60_000) {
                empty.push(group.id.clone());
            }
        }
        for id in empty {
            self.remove_group(&id);
        }
    }
}

/// Takes offsets out of a group; says so to the log if there were any.
fn forget(group: &mut Group, gone: impl Fn(&str, &Committed) -> bool) -> Option<Output> {
    let gone: Vec<(String, i32)> = group
        .offsets
        .iter()
        .filter(|(topic, _, committed)| gone(topic, committed))
        .map(|(topic, partition, _)| (topic.to_owned(), partition))
        .collect();
    if gone.is_empty() {
        return None;
    }
    let tombstone = |(topic, partition): (String, i32)| {
        group.offsets.remove(&topic, partition);
        (records::offset_key(&group.id, &topic, partition), None)
    };
    let records = gone.into_iter().map(tombstone).collect();
    Some(Output::Persist {
        group: group.id.clone(),
        records,
    })
}
