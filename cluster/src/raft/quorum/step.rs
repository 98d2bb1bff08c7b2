//! A step of a member: what is to be sent and persisted, and what was agreed on.

use prost::Message as _;
use raft::eraftpb::{ConfChange, ConfChangeV2, Entry, EntryType, Message, MessageType};

use super::{
    super::{members::node_of, storage},
    Quorum, QuorumError, SNAPSHOT_ELECTIONS, restore,
};
use crate::metadata::{Proposal, Snapshot, record};

/// A message for another member.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outgoing {
    /// To.
    pub node: i32,
    /// What.
    pub bytes: Vec<u8>,
}

/// The first half of a step.
#[derive(Default, Debug)]
pub struct Begun {
    /// To be sent now.
    pub send: Vec<Outgoing>,
    /// To be persisted before [`Quorum::finish`], flushed.
    pub persist: Option<Vec<u8>>,
}

/// A proposal that has come to its end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Applied {
    /// Whose.
    pub by: i32,
    /// Its id.
    pub id: u64,
    /// Whether it counts. If not, another change was first.
    pub counts: bool,
}

/// The second half of a step.
#[derive(Default, Debug)]
pub struct Finished {
    /// To be sent now.
    pub send: Vec<Outgoing>,
    /// Proposals that were applied, in order.
    pub applied: Vec<Applied>,
    /// The image was replaced by another member's.
    pub restored: bool,
    /// Answers to [`Quorum::ask_index`]: the id, and the index up to which was committed when it was asked.
    pub indexes: Vec<(u64, u64)>,
}

/// A step between its halves.
pub(super) struct Pending {
    number: u64,
    indexes: Vec<(u64, u64)>,
    send: Vec<Message>,
    committed: Vec<Entry>,
    snapshot: Option<raft::eraftpb::Snapshot>,
}

impl Quorum {
    /// Begins a step; `None` if there is nothing to do.
    pub fn begin(&mut self) -> Option<Begun> {
        assert!(self.pending.is_none(), "a step is finished before the next begins");
        if !self.raft.has_ready() {
            return None;
        }
        let mut ready = self.raft.ready();
        let messages = ready.take_messages();
        for message in messages.iter().filter(|m| m.get_msg_type() == MessageType::MsgSnapshot) {
            let ticks = SNAPSHOT_ELECTIONS * self.election_ticks;
            self.snapshots_sent.entry(message.to).or_insert(ticks);
        }
        let send = outgoing(messages);
        let snapshot = (!ready.snapshot().is_empty()).then(|| ready.snapshot().clone());
        if let Some(snapshot) = &snapshot {
            self.storage.install(snapshot.clone());
        }
        let follows = self.storage.append(ready.entries());
        assert!(follows, "the library's entries follow its log");
        if let Some(hard) = ready.hs() {
            self.storage.set_hard(hard.clone());
        }
        // A commit index alone need not be remembered: the others know it.
        let persist = ready
            .must_sync()
            .then(|| storage::encode(ready.hs(), snapshot.as_ref(), ready.entries()));
        let own = self.raft.raft.id.to_le_bytes();
        let mine = |state: &raft::ReadState| {
            let id = state.request_ctx.strip_prefix(&own)?;
            Some((u64::from_le_bytes(id.try_into().ok()?), state.index))
        };
        self.pending = Some(Pending {
            number: ready.number(),
            indexes: ready.read_states().iter().filter_map(mine).collect(),
            send: ready.take_persisted_messages(),
            committed: ready.take_committed_entries(),
            snapshot,
        });
        self.raft.advance_append_async(ready);
        Some(Begun { send, persist })
    }

    /// Ends a step whose bytes are durable.
    ///
    /// # Errors
    /// [`QuorumError`] if what the quorum agreed on cannot be understood here: this member must not go on.
    pub fn finish(&mut self) -> Result<Finished, QuorumError> {
        let step = self.pending.take().expect("a step was begun");
        self.raft.on_persist_ready(step.number);
        let mut finished = Finished {
            send: outgoing(step.send),
            applied: Vec::new(),
            restored: step.snapshot.is_some(),
            indexes: step.indexes,
        };
        if let Some(snapshot) = step.snapshot {
            self.image = restore(&snapshot.data)?;
            self.applied = snapshot.get_metadata().index;
        }
        self.apply(step.committed, &mut finished)?;
        self.raft.advance_apply_to(self.applied);
        Ok(finished)
    }

    /// If the log has grown long: bytes to be persisted, after which all records before them may go.
    pub fn compact(&mut self) -> Option<Vec<u8>> {
        let due = self.storage.bytes() >= self.snapshot_bytes || self.members_changed;
        if !due || self.pending.is_some() {
            return None;
        }
        self.members_changed = false;
        let data = record::encode(&Snapshot {
            version: self.image.version,
            records: self.image.snapshot(),
        });
        Some(self.storage.compact(self.applied, data))
    }

    fn apply(&mut self, entries: Vec<Entry>, finished: &mut Finished) -> Result<(), QuorumError> {
        for entry in entries {
            let (index, kind) = (entry.index, entry.entry_type);
            match entry.get_entry_type() {
                EntryType::EntryNormal if entry.data.is_empty() => {}
                EntryType::EntryNormal => {
                    let proposal: Proposal = record::decode(&entry.data)?;
                    let counts = proposal.base == self.image.version;
                    if counts {
                        let mut next = self.image.apply(&proposal.records);
                        next.version = index;
                        self.image = next;
                    }
                    finished.applied.push(Applied {
                        by: proposal.by,
                        id: proposal.id,
                        counts,
                    });
                }
                EntryType::EntryConfChange => {
                    let change = ConfChange::decode(&*entry.data).map_err(|_| unknown(kind, index))?;
                    self.storage.set_members(self.raft.apply_conf_change(&change)?);
                    self.members_changed = true;
                }
                EntryType::EntryConfChangeV2 => {
                    let change = ConfChangeV2::decode(&*entry.data).map_err(|_| unknown(kind, index))?;
                    self.storage.set_members(self.raft.apply_conf_change(&change)?);
                    self.members_changed = true;
                }
            }
            self.applied = index;
        }
        Ok(())
    }
}

fn unknown(kind: i32, index: u64) -> QuorumError {
    QuorumError::UnknownEntry { kind, index }
}

fn outgoing(messages: Vec<Message>) -> Vec<Outgoing> {
    messages
        .into_iter()
        .map(|m| Outgoing {
            node: node_of(m.to),
            bytes: m.encode_to_vec(),
        })
        .collect()
}
