//! One group of the classic protocol: its members and its state. Transitions are the coordinator's.
//!
//! ```text
//!            join                 all joined / timeout          leader's sync
//!  Empty ───────────► Preparing ───────────────────► Completing ─────────────► Stable
//!    ▲                 ▲   │                          │  join, leave, expiry      │
//!    └── last one left ┘   └── nobody joined          └───────► Preparing ◄───────┘
//! ```

use std::collections::{BTreeMap, HashMap, HashSet};

use bytes::{Buf, Bytes};

use super::{coordinator::ReplyId, offsets::Offsets};

/// Where a group is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GroupState {
    /// No members; perhaps offsets.
    Empty,
    /// Members are asked to join again.
    PreparingRebalance,
    /// The leader is assigning.
    CompletingRebalance,
    /// Everyone has an assignment.
    Stable,
}

impl GroupState {
    /// As Kafka's tools spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Empty => "Empty",
            Self::PreparingRebalance => "PreparingRebalance",
            Self::CompletingRebalance => "CompletingRebalance",
            Self::Stable => "Stable",
        }
    }
}

/// One member.
#[derive(Clone, Debug)]
pub struct Member {
    /// Given by the coordinator.
    pub id: String,
    /// Static membership (KIP-345).
    pub instance_id: Option<String>,
    /// As the client calls itself.
    pub client_id: String,
    /// Where it connects from.
    pub client_host: String,
    /// Silent for longer, it is out.
    pub session_timeout_ms: i32,
    /// How long the others wait for it to join again.
    pub rebalance_timeout_ms: i32,
    /// Protocols it can do, preferred first, with its subscription in each.
    pub protocols: Vec<(String, Bytes)>,
    /// What the leader gave it.
    pub assignment: Bytes,
    /// Its JoinGroup waits for the rebalance.
    pub awaiting_join: Option<ReplyId>,
    /// Its SyncGroup waits for the leader.
    pub awaiting_sync: Option<ReplyId>,
    /// When its session ends, ms.
    pub session_deadline: i64,
}

impl Member {
    /// Its subscription under a protocol.
    #[must_use]
    pub fn metadata(&self, protocol: &str) -> Bytes {
        self.protocols
            .iter()
            .find(|(name, _)| name == protocol)
            .map(|(_, m)| m.clone())
            .unwrap_or_default()
    }
}

/// One group.
///
/// Invariants: `leader` is a member or none; in `Stable` and `CompletingRebalance` a protocol is chosen; `Empty` has no members.
#[derive(Clone, Debug)]
pub struct Group {
    /// Its id.
    pub id: String,
    /// Where it is.
    pub state: GroupState,
    /// Since when, ms.
    pub state_since: i64,
    /// Number of rebalances done.
    pub generation: i32,
    /// `consumer` for consumers; none for a group that only commits offsets.
    pub protocol_type: Option<String>,
    /// The protocol in force.
    pub protocol: Option<String>,
    /// Assigns partitions.
    pub leader: Option<String>,
    /// By member id, so that answers come in one order.
    pub members: BTreeMap<String, Member>,
    /// Member ids handed out and not joined with yet, with when they lapse.
    pub pending: HashMap<String, i64>,
    /// Instance id → member id.
    pub instances: HashMap<String, String>,
    /// When the running rebalance ends, ms.
    pub rebalance_deadline: i64,
    /// The first rebalance waits for more members until here although all have joined.
    pub initial_delay_until: Option<i64>,
    /// Members joined since the initial delay was last prolonged.
    pub joined_during_delay: bool,
    /// When members that have not synced are out, ms.
    pub sync_deadline: i64,
    /// Committed offsets.
    pub offsets: Offsets,
}

impl Group {
    /// A group without members.
    #[must_use]
    pub fn new(id: String, now: i64) -> Self {
        Self {
            id,
            state: GroupState::Empty,
            state_since: now,
            generation: 0,
            protocol_type: None,
            protocol: None,
            leader: None,
            members: BTreeMap::new(),
            pending: HashMap::new(),
            instances: HashMap::new(),
            rebalance_deadline: i64::MAX,
            initial_delay_until: None,
            joined_during_delay: false,
            sync_deadline: i64::MAX,
            offsets: Offsets::default(),
        }
    }

    pub(super) fn enter(&mut self, state: GroupState, now: i64) {
        self.state = state;
        self.state_since = now;
    }

    /// The longest rebalance timeout of its members.
    #[must_use]
    pub fn rebalance_timeout_ms(&self) -> i64 {
        self.members
            .values()
            .map(|m| i64::from(m.rebalance_timeout_ms))
            .max()
            .unwrap_or(0)
    }

    /// Whether every member waits in JoinGroup and no handed-out id is outstanding.
    #[must_use]
    pub fn all_joined(&self) -> bool {
        self.pending.is_empty() && self.members.values().all(|m| m.awaiting_join.is_some())
    }

    /// Whether a member with these protocols shares one with all others.
    #[must_use]
    pub fn supports(&self, member_id: &str, protocol_type: &str, protocols: &[(String, Bytes)]) -> bool {
        let mut others = self.members.values().filter(|m| m.id != member_id).peekable();
        if others.peek().is_none() {
            return true;
        }
        if self.protocol_type.as_deref() != Some(protocol_type) {
            return false;
        }
        let mut common: HashSet<&str> = protocols.iter().map(|(n, _)| n.as_str()).collect();
        for other in others {
            common.retain(|name| other.protocols.iter().any(|(n, _)| n == name));
        }
        !common.is_empty()
    }

    /// The protocol that most members prefer of those all can do.
    #[must_use]
    pub fn vote(&self) -> Option<String> {
        let common = |name: &str| {
            self.members
                .values()
                .all(|m| m.protocols.iter().any(|(n, _)| n == name))
        };
        let mut votes: BTreeMap<&str, usize> = BTreeMap::new();
        for member in self.members.values() {
            if let Some((name, _)) = member.protocols.iter().find(|(n, _)| common(n)) {
                *votes.entry(name).or_default() += 1;
            }
        }
        votes
            .into_iter()
            .max_by_key(|(_, n)| *n)
            .map(|(name, _)| name.to_owned())
    }

    /// Topics its members subscribe to; `None` if it is no consumer group or a subscription does not parse.
    #[must_use]
    pub fn subscribed_topics(&self) -> Option<HashSet<String>> {
        if self.protocol_type.as_deref() != Some("consumer") {
            return None;
        }
        let protocol = self.protocol.as_deref()?;
        let mut topics = HashSet::new();
        for member in self.members.values() {
            topics.extend(parse_subscription(&member.metadata(protocol))?);
        }
        Some(topics)
    }
}

/// Topics of a consumer protocol subscription: `version i16 | topics [string] | …`.
fn parse_subscription(mut bytes: &[u8]) -> Option<Vec<String>> {
    if bytes.len() < 6 {
        return None;
    }
    let _version = bytes.get_i16();
    let count = usize::try_from(bytes.get_i32()).ok().filter(|n| *n <= bytes.len())?;
    let mut topics = Vec::with_capacity(count);
    for _ in 0..count {
        if bytes.len() < 2 {
            return None;
        }
        let len = usize::try_from(bytes.get_i16()).ok().filter(|n| *n <= bytes.len())?;
        let (name, rest) = bytes.split_at(len);
        topics.push(String::from_utf8(name.to_vec()).ok()?);
        bytes = rest;
    }
    Some(topics)
}
