//! From the members that the metadata names to the library's voters and learners.
//!
//! A member is a node *on a data folder*: its number in the library has the node in its lower half and the folder's generation in
//! the upper. A node that comes back with an emptied folder has forgotten how it voted, and is another member.

use std::collections::BTreeSet;

use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2, ConfState};

use crate::metadata::{Image, Member};

/// The library's numbers begin at 1, node ids at 0.
#[must_use]
pub fn raft_id(node: i32, generation: u32) -> u64 {
    u64::from(generation) << 32 | (i64::from(node) + 1) as u64
}

/// The node of a number of the library's.
#[must_use]
pub fn node_of(raft_id: u64) -> i32 {
    (i64::from(raft_id as u32) - 1) as i32
}

/// What a leader does about the members.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Step {
    /// They are as the metadata wants them, or not ready to be.
    Nothing,
    /// This member is to go or to stop voting: another one shall lead first.
    HandOver,
    /// Has the others agree on these.
    Change(ConfChangeV2),
}

/// What a leader knows of another member.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Known {
    /// It was heard of lately.
    pub alive: bool,
    /// It has nearly all of the log.
    pub caught_up: bool,
}

/// The next step from `current` to the members that `image` names. A new one votes only once it has caught up; one goes only if
/// a majority of those that are left then is alive, because they must agree on everything that comes, its return included.
pub(super) fn next_step(image: &Image, current: &ConfState, me: u64, known: impl Fn(u64) -> Known) -> Step {
    if !current.voters_outgoing.is_empty() || image.members().next().is_none() {
        // One change at a time; the library ends this one by itself.
        return Step::Nothing;
    }
    let id = |m: &Member| raft_id(m.node, m.generation);
    let wanted: BTreeSet<u64> = image.members().map(id).collect();
    let voters: BTreeSet<u64> = image.members().filter(|m| m.voter).map(id).collect();
    let is_member = |id: &u64| current.voters.contains(id) || current.learners.contains(id);
    let mut changes = Vec::new();
    let mut change = |kind: ConfChangeType, id: u64| {
        let mut single = ConfChangeSingle::default();
        single.set_change_type(kind);
        single.node_id = id;
        changes.push(single);
    };
    for id in wanted.iter().filter(|id| !is_member(id)) {
        change(ConfChangeType::AddLearnerNode, *id);
    }
    let mut left: BTreeSet<u64> = current.voters.iter().copied().collect();
    for id in current
        .learners
        .iter()
        .filter(|id| voters.contains(id) && known(**id).caught_up)
    {
        change(ConfChangeType::AddNode, *id);
        left.insert(*id);
    }
    for id in current.learners.iter().filter(|id| !wanted.contains(id)) {
        change(ConfChangeType::RemoveNode, *id);
    }
    for id in current.voters.iter().filter(|id| !voters.contains(id)) {
        let rest = || left.iter().filter(|n| *n != id);
        if rest().filter(|n| **n == me || known(**n).alive).count() * 2 <= rest().count() {
            continue;
        }
        if *id == me {
            return Step::HandOver;
        }
        left.remove(id);
        match wanted.contains(id) {
            true => change(ConfChangeType::AddLearnerNode, *id),
            false => change(ConfChangeType::RemoveNode, *id),
        }
    }
    if changes.is_empty() {
        return Step::Nothing;
    }
    Step::Change(ConfChangeV2 {
        changes,
        ..ConfChangeV2::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::MetadataRecord;

    fn image(members: &[(i32, u32, bool)]) -> Image {
        let records: Vec<MetadataRecord> = (members.iter())
            .map(|(node, generation, voter)| {
                MetadataRecord::Member(Member {
                    node: *node,
                    directory: [0; 16],
                    generation: *generation,
                    address: String::new(),
                    voter: *voter,
                })
            })
            .collect();
        Image::default().apply(&records)
    }

    fn state(voters: &[u64], learners: &[u64]) -> ConfState {
        ConfState {
            voters: voters.to_vec(),
            learners: learners.to_vec(),
            ..ConfState::default()
        }
    }

    fn all(caught_up: bool) -> impl Fn(u64) -> Known {
        move |_| Known { alive: true, caught_up }
    }

    fn changes(step: &Step) -> Vec<(ConfChangeType, u64)> {
        match step {
            Step::Change(change) => (change.changes.iter())
                .map(|c| (c.get_change_type(), c.node_id))
                .collect(),
            _ => Vec::new(),
        }
    }

    #[test]
    fn numbers_name_node_and_folder() {
        for (node, generation) in [(0, 0), (7, 0), (3, u32::MAX), (i32::MAX, 5)] {
            assert_eq!(node_of(raft_id(node, generation)), node);
        }
        assert_ne!(raft_id(1, 0), raft_id(1, 1));
    }

    #[test]
    fn a_new_member_listens_first_and_votes_once_it_has_caught_up() {
        let image = image(&[(0, 0, true), (1, 5, true)]);
        let new = raft_id(1, 5);
        let step = next_step(&image, &state(&[1], &[]), 1, all(false));
        assert_eq!(changes(&step), [(ConfChangeType::AddLearnerNode, new)]);
        let listens = state(&[1], &[new]);
        assert_eq!(next_step(&image, &listens, 1, all(false)), Step::Nothing);
        let step = next_step(&image, &listens, 1, all(true));
        assert_eq!(changes(&step), [(ConfChangeType::AddNode, new)]);
        assert_eq!(next_step(&image, &state(&[1, new], &[]), 1, all(true)), Step::Nothing);
    }

    #[test]
    fn an_emptied_folder_is_exchanged_in_one_step() {
        let image = image(&[(0, 0, true), (1, 0, true), (2, 9, true)]);
        let (old, new) = (raft_id(2, 0), raft_id(2, 9));
        let step = next_step(&image, &state(&[1, 2, old], &[]), 1, all(true));
        assert_eq!(
            changes(&step),
            [(ConfChangeType::AddLearnerNode, new), (ConfChangeType::RemoveNode, old)]
        );
    }

    #[test]
    fn a_leader_that_is_to_go_has_another_lead_first_and_the_last_voter_stays() {
        let image = image(&[(0, 0, false), (1, 0, true)]);
        let both = state(&[1, 2], &[]);
        assert_eq!(next_step(&image, &both, 1, all(true)), Step::HandOver);
        let step = next_step(&image, &both, 2, all(true));
        assert_eq!(changes(&step), [(ConfChangeType::AddLearnerNode, 1)]);
        assert_eq!(next_step(&image, &state(&[1], &[2]), 1, all(false)), Step::Nothing);
    }

    #[test]
    fn nobody_goes_if_too_few_would_be_left() {
        let image = image(&[(0, 0, true), (1, 0, true), (2, 0, false)]);
        let dead = |id| Known {
            alive: id != 1,
            caught_up: true,
        };
        assert_eq!(next_step(&image, &state(&[1, 2, 3], &[]), 2, dead), Step::Nothing);
        assert!(!changes(&next_step(&image, &state(&[1, 2, 3], &[]), 2, all(true))).is_empty());
    }
}
