//! Stories of the classic group protocol, told through the state machine's inputs and outputs. Time is a number.

use std::collections::HashMap;

use bytes::Bytes;
use millrace_cluster::group::{
    Coordinator, GroupConfig, GroupError, Output, ReplyId,
    classic::GroupState,
    coordinator::{Caller, Join, Joined, Synced},
    offsets::Committed,
    records,
};

/// A consumer's subscription to the topic `t`: version, one topic, no user data.
const SUBSCRIPTION: &[u8] = b"\0\0\0\0\0\x01\0\x01t\xff\xff\xff\xff";

struct Story {
    groups: Coordinator,
    now: i64,
    next: ReplyId,
    joined: HashMap<ReplyId, Result<Joined, (GroupError, String)>>,
    synced: HashMap<ReplyId, Result<Synced, GroupError>>,
    /// The log: key and value, in order.
    log: Vec<(Bytes, Option<Bytes>)>,
}

fn config() -> GroupConfig {
    GroupConfig {
        min_session_timeout_ms: 1000,
        max_session_timeout_ms: 60_000,
        initial_rebalance_delay_ms: 0,
        max_size: 3,
        metadata_max_bytes: 10,
        offsets_retention_ms: 100_000,
    }
}

impl Story {
    fn new(config: GroupConfig) -> Self {
        Self {
            groups: Coordinator::new(config),
            now: 1000,
            next: 0,
            joined: HashMap::new(),
            synced: HashMap::new(),
            log: Vec::new(),
        }
    }

    fn drain(&mut self) {
        while let Some(output) = self.groups.poll_output() {
            match output {
                Output::Persist { records, .. } => self.log.extend(records),
                Output::Joined(reply, answer) => {
                    assert!(self.joined.insert(reply, answer).is_none(), "answered twice");
                }
                Output::Synced(reply, answer) => {
                    assert!(self.synced.insert(reply, answer).is_none(), "answered twice");
                }
            }
        }
    }

    fn pass(&mut self, ms: i64) {
        self.now += ms;
        self.groups.tick(self.now);
        self.drain();
    }

    fn join(&mut self, member: &str, instance: Option<&str>) -> ReplyId {
        self.join_with(member, instance, |_| {})
    }

    fn join_with(&mut self, member: &str, instance: Option<&str>, change: impl FnOnce(&mut Join)) -> ReplyId {
        self.next += 1;
        let mut join = Join {
            group: "g".into(),
            member_id: member.into(),
            instance_id: instance.map(str::to_owned),
            client_id: "c".into(),
            client_host: "/h".into(),
            session_timeout_ms: 10_000,
            rebalance_timeout_ms: 30_000,
            protocol_type: "consumer".into(),
            protocols: vec![("range".into(), Bytes::from_static(SUBSCRIPTION))],
            require_member_id: false,
            knows_skip_assignment: true,
            new_member_id: format!("m{}", self.next),
        };
        change(&mut join);
        self.groups.join(self.next, join, self.now);
        self.drain();
        self.next
    }

    fn answer(&mut self, reply: ReplyId) -> Joined {
        self.joined.remove(&reply).expect("answered").expect("joined")
    }

    fn sync(&mut self, member: &str, generation: i32, assign: &[(&str, &'static [u8])]) -> ReplyId {
        self.next += 1;
        let assignments = assign
            .iter()
            .map(|(m, a)| ((*m).to_owned(), Bytes::from_static(a)))
            .collect();
        let caller = Caller {
            member_id: member,
            instance_id: None,
            generation,
        };
        self.groups.sync(
            self.next,
            "g",
            caller,
            (Some("consumer"), Some("range")),
            assignments,
            self.now,
        );
        self.drain();
        self.next
    }

    fn heartbeat(&mut self, member: &str, generation: i32) -> Result<(), GroupError> {
        let caller = Caller {
            member_id: member,
            instance_id: None,
            generation,
        };
        self.groups.heartbeat("g", caller, self.now)
    }

    /// Two members, assigned.
    fn stable() -> (Self, String, String, i32) {
        let mut story = Self::new(config());
        let first = story.join("", None);
        let one = story.answer(first);
        let second = story.join("", None);
        assert!(!story.joined.contains_key(&second), "the first must come back first");
        assert_eq!(
            story.heartbeat(&one.member_id, one.generation),
            Err(GroupError::RebalanceInProgress)
        );
        let again = story.join(&one.member_id, None);
        let (one, two) = (story.answer(again), story.answer(second));
        assert_eq!((one.generation, two.generation), (2, 2));
        assert_eq!(one.leader, one.member_id);
        assert_eq!(
            (one.members.len(), two.members.len()),
            (2, 0),
            "only the leader is told the members"
        );
        let waiting = story.sync(&two.member_id, 2, &[]);
        assert!(!story.synced.contains_key(&waiting), "the leader has not assigned yet");
        let leaders = story.sync(&one.member_id, 2, &[(&one.member_id, b"a"), (&two.member_id, b"b")]);
        assert_eq!(
            story
                .synced
                .remove(&leaders)
                .expect("answered")
                .expect("synced")
                .assignment,
            "a"
        );
        assert_eq!(
            story
                .synced
                .remove(&waiting)
                .expect("answered")
                .expect("synced")
                .assignment,
            "b"
        );
        (story, one.member_id, two.member_id, 2)
    }

    fn state(&self) -> GroupState {
        self.groups.group("g").expect("there").state
    }
}

#[test]
fn two_members_join_are_assigned_and_one_leaves() {
    let (mut story, one, two, generation) = Story::stable();
    assert_eq!(story.state(), GroupState::Stable);
    assert_eq!(story.heartbeat(&one, generation), Ok(()));
    assert_eq!(story.heartbeat(&one, 1), Err(GroupError::IllegalGeneration));
    assert_eq!(story.heartbeat("nobody", generation), Err(GroupError::UnknownMember));
    story.groups.leave("g", &two, None, story.now).expect("a member");
    story.drain();
    assert_eq!(story.heartbeat(&one, generation), Err(GroupError::RebalanceInProgress));
    let again = story.join(&one, None);
    assert_eq!(story.answer(again).members.len(), 1);
}

#[test]
fn silent_members_are_out_after_their_session() {
    let (mut story, one, two, generation) = Story::stable();
    story.pass(9_000);
    assert_eq!(story.heartbeat(&one, generation), Ok(()));
    story.pass(2_000);
    assert_eq!(story.heartbeat(&two, generation), Err(GroupError::UnknownMember));
    assert_eq!(story.state(), GroupState::PreparingRebalance);
    story.pass(60_000);
    assert_eq!(story.state(), GroupState::Empty, "nobody came back");
}

#[test]
fn members_that_do_not_come_back_are_left_behind_at_the_rebalance_timeout() {
    let (mut story, one, two, generation) = Story::stable();
    let third = story.join("", None);
    let again = story.join(&one, None);
    for _ in 0..4 {
        // The second keeps its session alive but does not join.
        story.pass(7_000);
        assert!(matches!(
            story.heartbeat(&two, generation),
            Err(GroupError::RebalanceInProgress)
        ));
    }
    story.pass(3_000);
    assert_eq!(story.answer(again).members.len(), 2);
    story.answer(third);
    assert_eq!(story.heartbeat(&two, generation), Err(GroupError::UnknownMember));
}

#[test]
fn members_that_never_sync_are_out() {
    let mut story = Story::new(config());
    let first = story.join("", None);
    let one = story.answer(first);
    for _ in 0..4 {
        story.pass(8_000);
        let _ = story.heartbeat(&one.member_id, one.generation);
    }
    assert_eq!(
        story.heartbeat(&one.member_id, one.generation),
        Err(GroupError::UnknownMember)
    );
}

#[test]
fn a_static_member_takes_its_place_again_without_a_rebalance() {
    let mut story = Story::new(config());
    let first = story.join("", Some("i"));
    let old = story.answer(first);
    story.sync(&old.member_id, 1, &[(&old.member_id, b"mine")]);
    let second = story.join("", Some("i"));
    let new = story.answer(second);
    assert_eq!((new.generation, new.skip_assignment), (1, true));
    assert_ne!(new.member_id, old.member_id);
    assert_eq!(story.state(), GroupState::Stable);
    let caller = Caller {
        member_id: &old.member_id,
        instance_id: Some("i"),
        generation: 1,
    };
    assert_eq!(
        story.groups.heartbeat("g", caller, story.now),
        Err(GroupError::FencedInstance)
    );
    let reply = story.sync(&new.member_id, 1, &[]);
    assert_eq!(
        story
            .synced
            .remove(&reply)
            .expect("answered")
            .expect("synced")
            .assignment,
        "mine"
    );
}

#[test]
fn the_first_rebalance_waits_for_more_members() {
    let mut story = Story::new(GroupConfig {
        initial_rebalance_delay_ms: 3000,
        ..config()
    });
    let first = story.join("", None);
    story.pass(2_000);
    let second = story.join("", None);
    assert!(story.joined.is_empty());
    story.pass(1_000);
    assert!(story.joined.is_empty(), "a member came: the delay is prolonged");
    story.pass(3_000);
    assert_eq!(story.answer(first).generation, 1);
    assert_eq!(story.answer(second).generation, 1);
}

#[test]
fn requests_that_cannot_be_are_refused() {
    let (mut story, one, _, generation) = Story::stable();
    let mut bad = |change: &dyn Fn(&mut Join)| {
        story.next += 1;
        let mut join = Join {
            group: "g".into(),
            member_id: String::new(),
            instance_id: None,
            client_id: String::new(),
            client_host: String::new(),
            session_timeout_ms: 10_000,
            rebalance_timeout_ms: 10_000,
            protocol_type: "consumer".into(),
            protocols: vec![("range".into(), Bytes::new())],
            require_member_id: true,
            knows_skip_assignment: true,
            new_member_id: "new".into(),
        };
        change(&mut join);
        story.groups.join(story.next, join, story.now);
        story.drain();
        story
            .joined
            .remove(&story.next)
            .expect("answered at once")
            .expect_err("refused")
            .0
    };
    assert_eq!(bad(&|j| j.group.clear()), GroupError::InvalidGroupId);
    assert_eq!(bad(&|j| j.session_timeout_ms = 1), GroupError::InvalidSessionTimeout);
    assert_eq!(bad(&|j| j.protocols.clear()), GroupError::InconsistentProtocol);
    assert_eq!(
        bad(&|j| j.protocols[0].0 = "other".into()),
        GroupError::InconsistentProtocol
    );
    assert_eq!(
        bad(&|j| j.protocol_type = "connect".into()),
        GroupError::InconsistentProtocol
    );
    assert_eq!(bad(&|j| j.member_id = "stranger".into()), GroupError::UnknownMember);
    assert_eq!(bad(&|_| {}), GroupError::MemberIdRequired);
    assert_eq!(story.groups.delete("g"), Err(GroupError::NonEmptyGroup));
    assert_eq!(story.groups.delete("h"), Err(GroupError::GroupNotFound));
    assert_eq!(
        story.groups.check_metadata("more than ten"),
        Err(GroupError::MetadataTooLarge)
    );
    for (member, generation, expected) in [
        (one.as_str(), generation, Ok(())),
        (one.as_str(), 1, Err(GroupError::IllegalGeneration)),
        ("", -1, Err(GroupError::UnknownMember)),
        ("stranger", generation, Err(GroupError::UnknownMember)),
        ("stranger", -1, Err(GroupError::UnknownMember)),
    ] {
        let caller = Caller {
            member_id: member,
            instance_id: None,
            generation,
        };
        assert_eq!(
            story.groups.check_commit("g", caller, story.now),
            expected,
            "{member} {generation}"
        );
    }
}

#[test]
fn whoever_states_no_generation_commits_for_a_group_without_members() {
    let (mut story, one, two, generation) = Story::stable();
    let commit = |story: &mut Story, group: &str, member_id: &str, instance_id: Option<&str>, generation: i32| {
        let caller = Caller {
            member_id,
            instance_id,
            generation,
        };
        story.groups.check_commit(group, caller, story.now)
    };
    assert_eq!(
        commit(&mut story, "", "", None, -1),
        Ok(()),
        "the empty id is one like any other"
    );
    assert_eq!(commit(&mut story, "new", "x", Some("y"), -1), Ok(()));
    assert_eq!(commit(&mut story, "other", "", None, 0), Err(GroupError::GroupNotFound));
    for member in [&one, &two] {
        story.groups.leave("g", member, None, story.now).expect("a member");
    }
    story.drain();
    assert_eq!(story.state(), GroupState::Empty);
    for (member, instance) in [("", None), (one.as_str(), None), ("stranger", None), ("", Some("i"))] {
        assert_eq!(
            commit(&mut story, "g", member, instance, -1),
            Ok(()),
            "{member} {instance:?}"
        );
        let late = commit(&mut story, "g", member, instance, generation);
        assert_eq!(late, Err(GroupError::UnknownMember), "{member} {instance:?}");
    }
}

#[test]
fn a_static_leader_whose_client_cannot_skip_the_assignment_is_told_that_it_does_not_lead() {
    let mut story = Story::new(config());
    let first = story.join("", Some("i"));
    let old = story.answer(first);
    story.sync(&old.member_id, 1, &[(&old.member_id, b"mine")]);
    let second = story.join_with("", Some("i"), |join| join.knows_skip_assignment = false);
    let new = story.answer(second);
    assert_eq!(new.generation, 1);
    assert_eq!(
        (new.leader.as_str(), new.members.len(), new.skip_assignment),
        (old.member_id.as_str(), 0, false)
    );
    assert_ne!(new.member_id, old.member_id);
    let reply = story.sync(&new.member_id, 1, &[]);
    let synced = story.synced.remove(&reply).expect("answered").expect("synced");
    assert_eq!(synced.assignment, Bytes::from_static(b"mine"));
}

#[test]
fn what_was_persisted_brings_the_group_back() {
    let (mut story, one, two, generation) = Story::stable();
    let committed = Committed {
        offset: 5,
        leader_epoch: 1,
        metadata: String::new(),
        commit_ms: story.now,
    };
    story.log.push((
        records::offset_key("g", "t", 0),
        Some(records::offset_value(&committed)),
    ));
    let mut after = Story::new(config());
    for (key, value) in &story.log {
        let record = records::decode(key, value.as_deref(), after.now).expect("decodes");
        after.groups.load(record, after.now);
    }
    after.groups.loaded(|_| true, after.now);
    assert_eq!(after.state(), GroupState::Stable);
    assert_eq!(after.heartbeat(&one, generation), Ok(()), "no needless rebalance");
    assert_eq!(after.heartbeat(&two, generation), Ok(()));
    assert_eq!(
        after.groups.group("g").and_then(|g| g.offsets.get("t", 0)),
        Some(&committed)
    );
    after.pass(60_000);
    assert_eq!(after.state(), GroupState::Empty);
    after.now += 100_001;
    after.groups.expire_offsets(&after.groups.ids(), after.now);
    after.drain();
    assert!(after.groups.group("g").is_none(), "nothing is left of it");
    assert!(
        after
            .log
            .iter()
            .any(|(key, value)| *key == records::group_key("g") && value.is_none())
    );
}

#[test]
fn offsets_of_topics_that_nobody_subscribes_to_any_more_expire() {
    let (mut story, one, two, generation) = Story::stable();
    for topic in ["t", "old"] {
        let committed = Committed {
            offset: 5,
            leader_epoch: 1,
            metadata: String::new(),
            commit_ms: story.now,
        };
        story.groups.committed("g", topic, 0, committed, story.now);
    }
    let topics = |story: &Story| -> Vec<String> {
        let group = story.groups.group("g").expect("it lives");
        group.offsets.iter().map(|(topic, ..)| topic.to_owned()).collect()
    };
    for _ in 0..20 {
        story.pass(5_000);
        assert_eq!(story.heartbeat(&one, generation), Ok(()));
        assert_eq!(story.heartbeat(&two, generation), Ok(()));
        assert_eq!(topics(&story), ["old", "t"], "not before the time is up");
        story.groups.expire_offsets(&story.groups.ids(), story.now - 1);
    }
    story.groups.expire_offsets(&story.groups.ids(), story.now);
    story.drain();
    assert_eq!(topics(&story), ["t"]);
    let key = records::offset_key("g", "old", 0);
    assert!(
        story.log.iter().any(|(k, v)| *k == key && v.is_none()),
        "the log says so"
    );
}
