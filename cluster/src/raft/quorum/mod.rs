//! One member of the metadata quorum.
//!
//! Call order: any of [`tick`](Quorum::tick), [`receive`](Quorum::receive), [`propose`](Quorum::propose); then
//! [`begin`](Quorum::begin) until it says there is nothing: send what it gives at once, persist what it wants persisted, then
//! [`finish`](Quorum::finish), send what that gives, and take note of what was applied. Time is in ms of a clock that does not
//! jump.
//!
//! A proposal states the version of the image that it was decided on. It counts if nothing changed the image in between, which
//! every member finds out for itself when the proposal is applied; so any member may propose, and a leader judges nothing.

mod step;

use std::collections::BTreeMap;

use prost::Message as _;
use raft::{
    Config, RawNode, SnapshotStatus, StateRole,
    eraftpb::{Entry, Message, MessageType},
};
use step::Pending;
pub use step::{Applied, Begun, Finished, Outgoing};
use thiserror::Error;

use super::{
    members::{self, Known, Step, node_of, raft_id},
    storage::{self, LogStorage},
};
use crate::metadata::{
    Image, Member, MetadataRecord, Proposal, Snapshot,
    record::{self, DecodeError},
};

/// Bytes of log after which the image becomes a snapshot and the log begins anew.
const SNAPSHOT_BYTES: usize = 8 << 20;
/// A snapshot that was sent and not heard of after so many election timeouts is sent again.
const SNAPSHOT_ELECTIONS: usize = 8;
/// Bytes of entries in one message; larger ones travel alone.
const MESSAGE_BYTES_MAX: u64 = 1 << 20;

/// Bytes of one proposal: more than any change of the metadata has (`controller::size`) but one of all partitions of a large cluster.
pub const PROPOSAL_BYTES_MAX: usize = 32 << 20;
/// Bytes of proposals that a leader takes without a majority's answer; further ones are dropped.
const UNCOMMITTED_BYTES_MAX: u64 = 2 * PROPOSAL_BYTES_MAX as u64;

/// Why a member cannot go on, or not do what it was asked.
#[derive(Debug, Error)]
pub enum QuorumError {
    /// The library's.
    #[error("the metadata quorum: {0}")]
    Raft(#[from] raft::Error),
    /// Bytes from the disk or a peer.
    #[error("the metadata quorum: {0}")]
    Decode(#[from] DecodeError),
    /// A message that is none, or not for this member.
    #[error("a message of the metadata quorum that cannot be: {reason}")]
    Message {
        /// What is wrong with it.
        reason: String,
    },
    /// A proposal that is too large: nobody would take it.
    #[error("a change of the metadata of {bytes} bytes; at most {PROPOSAL_BYTES_MAX} are made at once")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// This member's log has lost what it had: its folder was exchanged for an old copy.
    #[error(
        "the data folder is an old copy: its metadata log ends at {has}, and this node had it up to {had}. Empty the folder and start again: \
         what it lacks will be copied to it"
    )]
    OldCopy {
        /// Last index.
        has: u64,
        /// What the leader knows that it had.
        had: u64,
    },
    /// An entry that this build does not know.
    #[error(
        "the metadata log holds an entry of kind {kind} at {index}, which this build does not know; use the release that wrote it"
    )]
    UnknownEntry {
        /// Its kind.
        kind: i32,
        /// Where.
        index: u64,
    },
}

/// Who a member is, and its sense of time.
#[derive(Clone, Debug)]
pub struct QuorumConfig {
    /// This node.
    pub node: i32,
    /// Its data folder's generation ([`Member::generation`]).
    pub generation: u32,
    /// Time between two calls of [`Quorum::tick`], ms.
    pub tick_ms: i64,
    /// Silence of a leader after which an election begins, at the least, ms; twice that at the most.
    pub election_ms: i64,
    /// Time between two signs of life of a leader, ms.
    pub heartbeat_ms: i64,
    /// Chance for election timeouts.
    pub seed: u64,
}

/// A member.
pub struct Quorum {
    node: i32,
    raft: RawNode<LogStorage>,
    storage: LogStorage,
    image: Image,
    applied: u64,
    pending: Option<Pending>,
    /// When another member was last heard of.
    heard: BTreeMap<i32, i64>,
    /// Members that were sent a snapshot, and the ticks after which it counts as lost.
    snapshots_sent: BTreeMap<u64, usize>,
    snapshot_bytes: usize,
    /// Whoever joined since can only be sent a snapshot that names it.
    members_changed: bool,
    seed: u64,
    election_ticks: usize,
}

/// Entries of the log that a new member may lack and still be made a voter.
const CAUGHT_UP: u64 = 100;

/// The record that the metadata log of a new cluster begins with, in the folder of whoever founds it.
#[must_use]
pub fn found(cluster_id: &str, founders: Vec<Member>, feature_level: u16) -> Vec<u8> {
    let voters = founders.iter().map(|m| raft_id(m.node, m.generation)).collect();
    let mut records = vec![
        MetadataRecord::Cluster { id: cluster_id.into() },
        MetadataRecord::FeatureLevel { level: feature_level },
    ];
    records.extend(founders.into_iter().map(MetadataRecord::Member));
    let snapshot = Snapshot { version: 1, records };
    storage::founding(voters, record::encode(&snapshot))
}

impl Quorum {
    /// A member as its persisted records say; without any, one that is about to be sent what the others know.
    ///
    /// # Errors
    /// Records that do not decode.
    pub fn new(config: &QuorumConfig, stored: &[impl AsRef<[u8]>]) -> Result<Self, QuorumError> {
        let id = raft_id(config.node, config.generation);
        let storage = LogStorage::load(stored)?;
        let mut image = Image::default();
        let mut applied = 0;
        if let Some((index, data)) = storage.snapshot_data() {
            image = restore(&data)?;
            applied = index;
        }
        let election = (config.election_ms / config.tick_ms).max(2) as usize;
        let library = Config {
            id,
            election_tick: election,
            heartbeat_tick: (config.heartbeat_ms / config.tick_ms).max(1) as usize,
            applied,
            max_size_per_msg: MESSAGE_BYTES_MAX,
            max_inflight_msgs: 256,
            max_uncommitted_size: UNCOMMITTED_BYTES_MAX,
            check_quorum: true,
            pre_vote: true,
            ..Config::default()
        };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let mut quorum = Self {
            node: config.node,
            raft: RawNode::new(&library, storage.clone(), &logger)?,
            storage,
            image,
            applied,
            pending: None,
            heard: BTreeMap::new(),
            snapshots_sent: BTreeMap::new(),
            snapshot_bytes: SNAPSHOT_BYTES,
            seed: config.seed ^ id.rotate_left(32),
            members_changed: false,
            election_ticks: election,
        };
        quorum.settle_election_timeout();
        // Alone there is nobody to wait for.
        if quorum.is_alone() {
            quorum.raft.campaign()?;
        }
        Ok(quorum)
    }

    /// Snapshots after so many bytes of log instead of the usual.
    pub fn set_snapshot_bytes(&mut self, bytes: usize) {
        self.snapshot_bytes = bytes;
    }

    /// The library draws the silence after which an election begins from a random source of its own. This one follows from seed,
    /// node and term, so that a simulation can be repeated.
    fn settle_election_timeout(&mut self) {
        let mixed = (self.seed ^ self.term().wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        let extra = (mixed >> 33) as usize % self.election_ticks;
        self.raft
            .raft
            .set_randomized_election_timeout(self.election_ticks + extra);
    }

    /// This node.
    #[must_use]
    pub fn node(&self) -> i32 {
        self.node
    }

    /// Whether this node is the only member: it needs no ticks then.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        let conf = self.storage.members();
        conf.voters == [self.raft.raft.id] && conf.learners.is_empty() && conf.voters_outgoing.is_empty()
    }

    /// Whether this member knows who takes part: one that has just joined does not.
    #[must_use]
    pub fn knows_members(&self) -> bool {
        !self.storage.members().voters.is_empty()
    }

    /// Whether this node leads the quorum: it is the active controller.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.raft.raft.state == StateRole::Leader
    }

    /// The leader, as far as it is known.
    #[must_use]
    pub fn leader(&self) -> Option<i32> {
        let id = self.raft.raft.leader_id;
        (id != raft::INVALID_ID).then(|| node_of(id))
    }

    /// Raft's term.
    #[must_use]
    pub fn term(&self) -> u64 {
        self.raft.raft.term
    }

    /// The metadata as of the last entry applied here.
    #[must_use]
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Index of the last entry applied here.
    #[must_use]
    pub fn applied_index(&self) -> u64 {
        self.applied
    }

    /// Index of the last entry known to be committed.
    #[must_use]
    pub fn commit_index(&self) -> u64 {
        self.raft.raft.raft_log.committed
    }

    /// Voters and learners as node ids.
    #[must_use]
    pub fn members(&self) -> (Vec<i32>, Vec<i32>) {
        let conf = self.storage.members();
        let nodes = |ids: &[u64]| ids.iter().map(|id| node_of(*id)).collect();
        (nodes(&conf.voters), nodes(&conf.learners))
    }

    /// How far a member's log is known to go, by the leader.
    #[must_use]
    pub fn matched(&self, node: i32) -> Option<u64> {
        if node == self.node {
            return Some(self.raft.raft.raft_log.last_index());
        }
        let id = self.id_of(node)?;
        let progress = self.raft.raft.prs().get(id)?;
        self.is_leader().then_some(progress.matched)
    }

    /// The member that a node is, if it is one.
    fn id_of(&self, node: i32) -> Option<u64> {
        let conf = self.storage.members();
        (conf.voters.iter().chain(&conf.learners))
            .copied()
            .find(|id| node_of(*id) == node)
    }

    /// When another member was last heard of, ms; `None` for never.
    #[must_use]
    pub fn heard(&self, node: i32) -> Option<i64> {
        self.heard.get(&node).copied()
    }

    /// Time passes.
    pub fn tick(&mut self) {
        self.raft.tick();
        self.settle_election_timeout();
        let due: Vec<u64> = (self.snapshots_sent.iter_mut())
            .filter_map(|(to, ticks)| {
                *ticks -= 1;
                (*ticks == 0).then_some(*to)
            })
            .collect();
        for to in due {
            self.snapshots_sent.remove(&to);
            // A member that has it has said so by now, and then this means nothing.
            self.raft.report_snapshot(to, SnapshotStatus::Failure);
        }
    }

    /// A message from another member.
    ///
    /// # Errors
    /// [`QuorumError::Message`] if it is none; nothing has changed then.
    pub fn receive(&mut self, from: i32, bytes: &[u8], now_ms: i64) -> Result<(), QuorumError> {
        let wrong = |reason: String| QuorumError::Message { reason };
        let message = Message::decode(bytes).map_err(|e| wrong(e.to_string()))?;
        // A proposal passed on keeps the name of whoever made it.
        let passed_on = matches!(message.get_msg_type(), MessageType::MsgPropose);
        if node_of(message.from) != from && !passed_on || node_of(message.to) != self.node {
            return Err(wrong(format!(
                "node {from} sends one from {} to {}",
                message.from, message.to
            )));
        }
        if message.to != self.raft.raft.id {
            // Meant for what this node was before its folder was emptied.
            return Ok(());
        }
        if raft::raw_node::is_local_msg(message.get_msg_type()) {
            return Err(wrong(format!("node {from} sends one that never travels")));
        }
        let has = self.raft.raft.raft_log.last_index();
        // A leader tells of commits only as far as it was told that this log goes; the library would panic.
        if message.get_msg_type() == MessageType::MsgHeartbeat && message.term >= self.term() && message.commit > has {
            return Err(QuorumError::OldCopy {
                has,
                had: message.commit,
            });
        }
        self.heard.insert(from, now_ms);
        let too_large = |e: &Entry| e.data.len() > PROPOSAL_BYTES_MAX;
        if passed_on && message.entries.iter().any(too_large) {
            // Whoever made it hears nothing of it, and gives it up.
            return Ok(());
        }
        let stepped = self.raft.step(message);
        self.settle_election_timeout();
        match stepped {
            // Of a member that was removed, or of a term gone by: dropped, as Raft wants it.
            Ok(()) | Err(raft::Error::StepPeerNotFound | raft::Error::ProposalDropped) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The leader is known to be gone: it is not waited for any longer, by this member nor by those who ask it for its vote.
    pub fn forget_leader(&mut self) {
        if self.raft.raft.state == StateRole::Follower && self.leader().is_some() {
            let term = self.term();
            self.raft.raft.become_follower(term, raft::INVALID_ID);
            self.settle_election_timeout();
        }
    }

    /// Begins an election now, if there is no leader.
    ///
    /// # Errors
    /// The library's.
    pub fn campaign(&mut self) -> Result<(), QuorumError> {
        if self.leader().is_none() && self.raft.raft.promotable() {
            self.raft.campaign()?;
            self.settle_election_timeout();
        }
        Ok(())
    }

    /// Another member cannot be reached.
    pub fn unreachable(&mut self, node: i32) {
        if let Some(id) = self.id_of(node) {
            self.raft.report_unreachable(id);
        }
    }

    /// Proposes records that were decided on the image of version `base`. They count once [`Finished::applied`] says so; a
    /// proposal may also be lost without a word, when leaders change.
    ///
    /// # Errors
    /// There is no leader now, or it takes no more; [`QuorumError::TooLarge`].
    pub fn propose(&mut self, id: u64, base: u64, records: Vec<MetadataRecord>) -> Result<(), QuorumError> {
        let proposal = Proposal {
            base,
            by: self.node,
            id,
            records,
        };
        let encoded = record::encode(&proposal);
        if encoded.len() > PROPOSAL_BYTES_MAX {
            return Err(QuorumError::TooLarge { bytes: encoded.len() });
        }
        Ok(self.raft.propose(Vec::new(), encoded)?)
    }

    /// Asks up to which index the log is committed now, by all that anybody was told; [`Finished::indexes`] brings the answer,
    /// or never, when leaders change.
    pub fn ask_index(&mut self, id: u64) {
        let context = [self.raft.raft.id.to_le_bytes(), id.to_le_bytes()].concat();
        self.raft.read_index(context);
    }

    /// Asks another voter to lead in this one's stead.
    pub fn hand_over(&mut self) {
        let best = (self.members().0.into_iter())
            .filter(|n| *n != self.node)
            .max_by_key(|n| (self.matched(*n), self.heard(*n)));
        if let (true, Some(id)) = (self.is_leader(), best.and_then(|n| self.id_of(n))) {
            self.raft.transfer_leader(id);
        }
    }

    /// Makes the members those that the metadata names, a step at a time, while this node leads. To be called now and then.
    ///
    /// # Errors
    /// The library's.
    pub fn settle_members(&mut self) -> Result<(), QuorumError> {
        let raft = &self.raft.raft;
        if !self.is_leader() || raft.has_pending_conf() {
            return Ok(());
        }
        let last = raft.raft_log.last_index();
        let known = |id| {
            let progress = raft.prs().get(id);
            Known {
                alive: progress.is_some_and(|p| p.recent_active),
                caught_up: progress.is_some_and(|p| p.matched + CAUGHT_UP >= last),
            }
        };
        match members::next_step(&self.image, &self.storage.members(), raft.id, known) {
            Step::Nothing => {}
            Step::HandOver => self.hand_over(),
            Step::Change(change) => match self.raft.propose_conf_change(Vec::new(), change) {
                // It does not lead any more, or cannot now: whoever leads next sees to it.
                Ok(()) | Err(raft::Error::ProposalDropped) => {}
                Err(error) => return Err(error.into()),
            },
        }
        Ok(())
    }
}

fn restore(data: &[u8]) -> Result<Image, QuorumError> {
    let snapshot: Snapshot = record::decode(data)?;
    let mut image = Image::default().apply(&snapshot.records);
    image.version = snapshot.version;
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::ConfigResource;

    fn alone() -> Quorum {
        let config = QuorumConfig {
            node: 1,
            generation: 0,
            tick_ms: 10,
            election_ms: 100,
            heartbeat_ms: 20,
            seed: 1,
        };
        let member = Member {
            node: 1,
            directory: [1; 16],
            generation: 0,
            address: String::new(),
            voter: true,
        };
        let mut quorum = Quorum::new(&config, &[found("c", vec![member], 1)]).expect("sound");
        settle(&mut quorum);
        assert!(quorum.is_leader());
        quorum
    }

    fn settle(quorum: &mut Quorum) {
        while quorum.begin().is_some() {
            quorum.finish().expect("sound");
        }
    }

    fn change(bytes: usize) -> Vec<MetadataRecord> {
        vec![MetadataRecord::Config {
            resource: ConfigResource::Broker(None),
            name: "x".into(),
            value: Some("v".repeat(bytes)),
        }]
    }

    #[test]
    fn a_proposal_that_is_too_large_comes_into_no_log() {
        let mut quorum = alone();
        let version = quorum.image().version;
        let refused = quorum.propose(1, version, change(PROPOSAL_BYTES_MAX));
        assert!(matches!(refused, Err(QuorumError::TooLarge { .. })), "{refused:?}");

        // One that another member passes on.
        let id = quorum.raft.raft.id;
        let mut receive = |bytes: usize| {
            let before = quorum.raft.raft.raft_log.last_index();
            let proposal = Proposal {
                base: version,
                by: 2,
                id: 1,
                records: change(bytes),
            };
            let entry = Entry {
                data: record::encode(&proposal),
                ..Entry::default()
            };
            let mut message = Message {
                from: raft_id(2, 0),
                to: id,
                entries: vec![entry],
                ..Message::default()
            };
            message.set_msg_type(MessageType::MsgPropose);
            quorum
                .receive(2, &message.encode_to_vec(), 0)
                .expect("no reason to hang up");
            quorum.raft.raft.raft_log.last_index() - before
        };
        assert_eq!(receive(PROPOSAL_BYTES_MAX), 0);
        assert_eq!(receive(10), 1);
    }
}
