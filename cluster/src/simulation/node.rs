//! The parts of a world: chance, nodes, messages.

use std::collections::VecDeque;

use millrace_engine::{
    LeaderEpoch, Offset,
    agreed::Agreed,
    log::{EpochCache, ProducerStates},
};

use super::groups::Coordinating;
use crate::{
    metadata::PartitionImage,
    replica::{
        Answer, Handover, Leader, Request,
        follower::{Log, Stood},
    },
};

/// xorshift64*.
pub(super) struct Rng(pub u64);

impl Rng {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }

    pub fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

/// Takes in what happens.
pub(super) type Tell = Box<dyn FnMut(String)>;
/// A record: the epoch it was written under, and what it says.
pub(super) type Entry = (LeaderEpoch, u64);

#[derive(Default)]
pub(super) enum Role {
    #[default]
    None,
    Leads(Leader),
    Follows(i32),
}

#[derive(Default)]
pub(super) struct Node {
    pub up: bool,
    pub paused_until: i64,
    pub log: Vec<Entry>,
    pub epochs: EpochCache,
    pub producers: ProducerStates,
    pub handover: Handover,
    pub durable: usize,
    pub high_watermark: Offset,
    /// What stands before it is deleted, durably; the model keeps the records.
    pub log_start: Offset,
    /// A log start that is on its way to the disk, who is to be told, and in answer to what.
    pub starting: Option<(Offset, usize, Request)>,
    /// The high watermark as it was noted last; stays over a crash.
    pub noted: Option<Agreed>,
    /// Below this its log was compared with what others showed.
    pub checked: Offset,
    pub epoch: LeaderEpoch,
    pub role: Role,
    /// Metadata that it has not taken in yet: when it comes, and what.
    pub news: VecDeque<(i64, PartitionImage)>,
    pub started: u64,
    /// Its data folder's number: another one each time it is emptied.
    pub directory: u8,
    /// It was emptied, and has not said so yet.
    pub emptied: bool,
    /// What it last said of its log.
    pub stood: Stood,
    /// Appends that are to be answered when they are durable: log end, to whom, what was asked.
    pub appends: VecDeque<(Offset, usize, Request)>,
    /// Its groups, while it leads.
    pub coordinating: Option<Coordinating>,
}

impl Node {
    /// Loses everything in memory.
    pub fn forget(&mut self) {
        self.up = false;
        self.high_watermark = self.log_start;
        self.role = Role::None;
        self.stood = Stood::default();
        self.epoch = -1;
        self.news.clear();
        self.appends.clear();
        self.starting = None;
        self.coordinating = None;
    }

    /// Notes what was agreed on below `high_watermark`.
    pub fn note(&mut self, high_watermark: Offset) {
        self.noted = Agreed::renewed(self.noted, high_watermark, &self.epochs, self.log_end());
    }

    /// What was agreed on, as far as it knows or noted it.
    pub fn recall(&self) -> Offset {
        let noted = self.noted.and_then(|n| n.recall(&self.epochs, self.log_end()));
        self.high_watermark.max(noted.unwrap_or(0))
    }

    pub fn append(&mut self, entry: Entry) {
        self.epochs.note(entry.0, self.log_end());
        self.log.push(entry);
    }

    pub fn look(&self) -> Log<'_> {
        Log {
            log_start: 0,
            log_end: self.log_end(),
            durable_end: self.durable as Offset,
            epochs: &self.epochs,
        }
    }

    pub fn log_end(&self) -> Offset {
        self.log.len() as Offset
    }

    pub fn cut(&mut self, to: Offset) {
        self.log.truncate(to as usize);
        self.epochs.trim_end(to);
        self.producers.truncate(to);
        self.checked = self.checked.min(to);
        self.durable = self.durable.min(self.log.len());
        self.high_watermark = self.high_watermark.min(to);
        self.log_start = self.log_start.min(to);
    }
}

pub(super) enum Message {
    /// With the offset of the first entry that it brings.
    Request(Request, Option<Offset>, Vec<Entry>),
    Answer(Answer),
}

/// Messages in order, and when each comes.
pub(super) type Queue = VecDeque<(i64, Message)>;
