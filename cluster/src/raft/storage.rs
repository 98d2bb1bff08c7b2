//! The quorum's log as the library reads it, from memory, and as it is persisted: records that are appended to a log of the
//! engine and read back in order.

use std::{cell::RefCell, rc::Rc};

use raft::{
    GetEntriesContext, RaftState, Storage,
    eraftpb::{ConfState, Entry, HardState, Snapshot},
};
use rkyv::{Archive, Deserialize, Serialize};

use crate::metadata::{
    MetadataRecord, Proposal,
    record::{self, DecodeError},
};

/// An entry of the quorum's log. Of the library's kinds of entries only two are used: a change, and a change of the members.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub(crate) struct StoredEntry {
    term: u64,
    index: u64,
    kind: i32,
    data: Vec<u8>,
    context: Vec<u8>,
}

/// Who takes part.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct StoredMembers {
    voters: Vec<u64>,
    learners: Vec<u64>,
    voters_outgoing: Vec<u64>,
    learners_next: Vec<u64>,
    auto_leave: bool,
}

/// An image, and where in the log it stands.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub(crate) struct StoredSnapshot {
    index: u64,
    term: u64,
    members: StoredMembers,
    data: Vec<u8>,
}

/// One record: what one step of the library wants durable.
#[derive(Archive, Serialize, Deserialize, Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Stored {
    /// Term, vote, commit index.
    hard: Option<(u64, u64, u64)>,
    /// Replaces everything before it.
    snapshot: Option<StoredSnapshot>,
    /// Replace what stands at their indexes and behind.
    entries: Vec<StoredEntry>,
}

impl From<&ConfState> for StoredMembers {
    fn from(c: &ConfState) -> Self {
        Self {
            voters: c.voters.clone(),
            learners: c.learners.clone(),
            voters_outgoing: c.voters_outgoing.clone(),
            learners_next: c.learners_next.clone(),
            auto_leave: c.auto_leave,
        }
    }
}

impl From<StoredMembers> for ConfState {
    fn from(m: StoredMembers) -> Self {
        Self {
            voters: m.voters,
            learners: m.learners,
            voters_outgoing: m.voters_outgoing,
            learners_next: m.learners_next,
            auto_leave: m.auto_leave,
        }
    }
}

impl From<&Entry> for StoredEntry {
    fn from(e: &Entry) -> Self {
        Self {
            term: e.term,
            index: e.index,
            kind: e.entry_type,
            data: e.data.clone(),
            context: e.context.clone(),
        }
    }
}

impl From<StoredEntry> for Entry {
    fn from(e: StoredEntry) -> Self {
        Self {
            entry_type: e.kind,
            term: e.term,
            index: e.index,
            data: e.data,
            context: e.context,
            ..Self::default()
        }
    }
}

impl From<&Snapshot> for StoredSnapshot {
    fn from(s: &Snapshot) -> Self {
        let metadata = s.get_metadata();
        Self {
            index: metadata.index,
            term: metadata.term,
            members: metadata.get_conf_state().into(),
            data: s.data.clone(),
        }
    }
}

impl From<StoredSnapshot> for Snapshot {
    fn from(s: StoredSnapshot) -> Self {
        let mut snapshot = Self {
            data: s.data,
            ..Self::default()
        };
        let metadata = snapshot.mut_metadata();
        metadata.index = s.index;
        metadata.term = s.term;
        metadata.set_conf_state(s.members.into());
        snapshot
    }
}

/// The metadata records in a persisted record, whether they came to count or not: for those who save what they can of a damaged
/// log.
///
/// # Errors
/// [`DecodeError`].
pub fn records_in(bytes: &[u8]) -> Result<Vec<MetadataRecord>, DecodeError> {
    let stored: Stored = record::decode(bytes)?;
    let mut records = Vec::new();
    if let Some(snapshot) = stored.snapshot {
        records.extend(record::decode::<crate::metadata::Snapshot>(&snapshot.data)?.records);
    }
    for entry in stored.entries.iter().filter(|e| !e.data.is_empty()) {
        if let Ok(proposal) = record::decode::<Proposal>(&entry.data) {
            records.extend(proposal.records);
        }
    }
    Ok(records)
}

/// The bytes to persist for a step.
pub(crate) fn encode(hard: Option<&HardState>, snapshot: Option<&Snapshot>, entries: &[Entry]) -> Vec<u8> {
    record::encode(&Stored {
        hard: hard.map(|h| (h.term, h.vote, h.commit)),
        snapshot: snapshot.map(Into::into),
        entries: entries.iter().map(Into::into).collect(),
    })
}

/// The record that a log begins with: an image, and the voters that agree on what comes.
pub(crate) fn founding(voters: Vec<u64>, data: Vec<u8>) -> Vec<u8> {
    let snapshot = StoredSnapshot {
        index: 1,
        term: 1,
        members: StoredMembers {
            voters,
            ..StoredMembers::default()
        },
        data,
    };
    record::encode(&Stored {
        hard: Some((1, 0, 1)),
        snapshot: Some(snapshot),
        entries: Vec::new(),
    })
}

#[derive(Default)]
struct Inner {
    hard: HardState,
    members: ConfState,
    /// The latest snapshot: what stands at and before its index is in it. Empty, at index 0, in the beginning.
    snapshot: Snapshot,
    /// What stands behind the snapshot.
    entries: Vec<Entry>,
}

impl Inner {
    fn first(&self) -> u64 {
        self.snapshot.get_metadata().index + 1
    }

    fn last(&self) -> u64 {
        self.snapshot.get_metadata().index + self.entries.len() as u64
    }
}

/// What the library reads; clones are the same storage.
///
/// Invariant: the entries follow the snapshot without a gap.
#[derive(Clone, Default)]
pub(crate) struct LogStorage(Rc<RefCell<Inner>>);

impl LogStorage {
    /// The storage that persisted records add up to; without any it knows of no members, and waits to be sent a snapshot.
    pub fn load(stored: &[impl AsRef<[u8]>]) -> Result<Self, DecodeError> {
        let storage = Self::default();
        for bytes in stored {
            let stored: Stored = record::decode(bytes.as_ref())?;
            if let Some(snapshot) = stored.snapshot {
                storage.install(snapshot.into());
            }
            let entries: Vec<Entry> = stored.entries.into_iter().map(Into::into).collect();
            if !storage.append(&entries) {
                return Err(DecodeError::new("entries of the quorum's log are missing"));
            }
            if let Some((term, vote, commit)) = stored.hard {
                storage.set_hard(HardState { term, vote, commit });
            }
        }
        {
            let mut inner = storage.0.borrow_mut();
            let (first, last) = (inner.first(), inner.last());
            inner.hard.commit = inner.hard.commit.clamp(first - 1, last);
        }
        Ok(storage)
    }

    /// Who takes part, as of what was applied.
    pub fn members(&self) -> ConfState {
        self.0.borrow().members.clone()
    }

    pub fn set_hard(&self, hard: HardState) {
        self.0.borrow_mut().hard = hard;
    }

    pub fn set_members(&self, members: ConfState) {
        self.0.borrow_mut().members = members;
    }

    /// Appends entries, in place of what stands at their indexes and behind; false if there is a gap before them.
    pub fn append(&self, entries: &[Entry]) -> bool {
        let mut inner = self.0.borrow_mut();
        // What the snapshot holds already is not appended again.
        let first = inner.first();
        let entries = &entries[entries.partition_point(|e| e.index < first)..];
        let Some(begin) = entries.first().map(|e| e.index) else {
            return true;
        };
        if begin > inner.last() + 1 {
            return false;
        }
        inner.entries.truncate((begin - first) as usize);
        inner.entries.extend_from_slice(entries);
        true
    }

    /// Takes in a snapshot that is ahead of this log; everything else goes.
    pub fn install(&self, snapshot: Snapshot) {
        let mut inner = self.0.borrow_mut();
        let metadata = snapshot.get_metadata();
        inner.hard.term = inner.hard.term.max(metadata.term);
        inner.hard.commit = metadata.index;
        inner.members = metadata.get_conf_state().clone();
        inner.entries.clear();
        inner.snapshot = snapshot;
    }

    /// Makes a snapshot at `index`, which is applied, drops what stands before, and returns the bytes that replace all
    /// records so far.
    pub fn compact(&self, index: u64, data: Vec<u8>) -> Vec<u8> {
        let term = self.term(index).expect("applied entries are in the log");
        let mut inner = self.0.borrow_mut();
        let mut snapshot = Snapshot {
            data,
            ..Snapshot::default()
        };
        let metadata = snapshot.mut_metadata();
        metadata.index = index;
        metadata.term = term;
        metadata.set_conf_state(inner.members.clone());
        let gone = (index + 1 - inner.first()) as usize;
        inner.entries.drain(..gone);
        inner.snapshot = snapshot;
        encode(Some(&inner.hard), Some(&inner.snapshot), &inner.entries)
    }

    /// Index and image of the latest snapshot, if there is one.
    pub fn snapshot_data(&self) -> Option<(u64, Vec<u8>)> {
        let inner = self.0.borrow();
        let index = inner.snapshot.get_metadata().index;
        (index > 0).then(|| (index, inner.snapshot.data.clone()))
    }

    /// Bytes of the entries behind the snapshot.
    pub fn bytes(&self) -> usize {
        self.0.borrow().entries.iter().map(|e| e.data.len() + 64).sum()
    }
}

impl Storage for LogStorage {
    fn initial_state(&self) -> raft::Result<RaftState> {
        let inner = self.0.borrow();
        Ok(RaftState::new(inner.hard.clone(), inner.members.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        let inner = self.0.borrow();
        let first = inner.first();
        if low < first {
            return Err(raft::Error::Store(raft::StorageError::Compacted));
        }
        assert!(high <= inner.last() + 1, "entries up to {high} of {}", inner.last());
        let mut entries = inner.entries[(low - first) as usize..(high - first) as usize].to_vec();
        raft::util::limit_size(&mut entries, max_size.into());
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        let inner = self.0.borrow();
        let metadata = inner.snapshot.get_metadata();
        if index == metadata.index {
            return Ok(metadata.term);
        }
        if index < metadata.index {
            return Err(raft::Error::Store(raft::StorageError::Compacted));
        }
        let entry = inner.entries.get((index - inner.first()) as usize);
        entry
            .map(|e| e.term)
            .ok_or(raft::Error::Store(raft::StorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.0.borrow().first())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.0.borrow().last())
    }

    fn snapshot(&self, request_index: u64, _: u64) -> raft::Result<Snapshot> {
        let inner = self.0.borrow();
        if inner.snapshot.get_metadata().index < request_index {
            return Err(raft::Error::Store(raft::StorageError::SnapshotTemporarilyUnavailable));
        }
        Ok(inner.snapshot.clone())
    }
}
