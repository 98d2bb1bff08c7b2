//! The idempotent producers of a world (KIP-98), as librdkafka and Kafka's own client are: several batches in flight over one
//! connection, answered in order, sent again in order until they are acknowledged. Told of a gap, they wait for what is in flight
//! and number all that is not acknowledged anew, under a new epoch.

use std::collections::{BTreeMap, VecDeque};

use millrace_engine::{
    AppendError, LeaderEpoch, Offset, PartitionKey, ProducerEpoch, ProducerId,
    batch::{BatchHeader, PayloadFormat, RecordKind},
    kafka_batch::BatchInfo,
    log::{IN_FLIGHT, SequenceCheck},
};

use super::{Bug, HANDOVER_MS, MIN_INSYNC, TOPIC, World, node::Role};
use crate::replica::Handover;

/// Silence of a broker after which a producer takes the connection for broken, ms.
const PATIENCE_MS: i64 = 120;

/// A message as a producer numbered it for the broker; the key of its record in the logs.
#[derive(Clone, Copy)]
struct Numbered {
    producer: usize,
    message: u64,
    epoch: ProducerEpoch,
    sequence: i32,
}

#[derive(Clone, Copy)]
enum Reply {
    Acknowledged(Offset),
    Again,
    Elsewhere,
    Gap,
    Fenced,
}

#[derive(Clone, Copy)]
enum State {
    /// Reaches the broker then.
    Sent(i64),
    Appended(Offset, LeaderEpoch),
    /// Decided upon; reaches the producer then, once it is the first.
    Answered(i64, Reply),
}

/// A batch that waits for its acknowledgement.
struct Unanswered {
    value: u64,
    message: u64,
    /// A broker was asked, and has not answered.
    asked: bool,
}

#[derive(Default)]
struct Producer {
    epoch: ProducerEpoch,
    sequence: i32,
    messages: u64,
    /// Oldest first.
    unanswered: VecDeque<Unanswered>,
    /// It waits for what is in flight, to number anew.
    drains: bool,
    broker: usize,
    calls: VecDeque<(u64, State)>,
    /// When the broker was last heard.
    heard: i64,
    waits_until: i64,
    acknowledged: usize,
    /// Its last message that consumers saw.
    seen: u64,
}

pub(super) struct Producers {
    all: Vec<Producer>,
    sent: BTreeMap<u64, Numbered>,
    /// What is on its way over connections that the producer has left: when it comes, to whom, what.
    strays: Vec<(i64, usize, u64)>,
}

impl Producers {
    pub fn new(count: usize) -> Self {
        Self {
            all: (0..count).map(|_| Producer::default()).collect(),
            sent: BTreeMap::new(),
            strays: Vec::new(),
        }
    }
}

impl Numbered {
    fn id(&self) -> ProducerId {
        self.producer as ProducerId
    }

    fn info(&self) -> BatchInfo {
        BatchInfo {
            attributes: 0,
            last_offset_delta: 0,
            base_timestamp: 0,
            min_timestamp: 0,
            max_timestamp: 0,
            producer_id: self.id(),
            producer_epoch: self.epoch,
            base_sequence: self.sequence,
            record_count: 1,
        }
    }

    fn header(&self, offset: Offset) -> BatchHeader {
        BatchHeader {
            kind: RecordKind::Batch,
            format: PayloadFormat::KafkaV2,
            key: PartitionKey {
                topic: TOPIC,
                partition: 0,
            },
            base_offset: offset,
            last_offset: offset,
            leader_epoch: 0,
            record_count: 1,
            attributes: 0,
            base_timestamp: 0,
            max_timestamp: 0,
            producer_id: self.id(),
            producer_epoch: self.epoch,
            base_sequence: self.sequence,
            payload_len: 0,
            payload_crc: 0,
            segment_base: 0,
            segment_position: 0,
        }
    }
}

impl World {
    /// Brokers and idempotent producers talk.
    pub(super) fn produce_in_sequence(&mut self) -> Result<(), String> {
        self.take_strays();
        for producer in 0..self.producers.all.len() {
            self.serve_calls(producer);
            self.take_answers(producer)?;
            self.produce_more(producer);
        }
        Ok(())
    }

    /// A follower or a leader has appended from there on.
    pub(super) fn note_producers(&mut self, node: usize, from: Offset) {
        let now = self.now;
        let n = &mut self.nodes[node];
        for (at, (_, value)) in n.log.iter().enumerate().skip(from as usize) {
            if let Some(numbered) = self.producers.sent.get(value) {
                n.producers.note(&numbered.header(at as Offset), now);
            }
        }
    }

    /// A node is gone, with what had come to it.
    pub(super) fn producers_lose(&mut self, node: usize) {
        self.producers.strays.retain(|(_, to, _)| *to != node);
        for producer in 0..self.producers.all.len() {
            if self.producers.all[producer].broker == node {
                self.producers.all[producer].calls.clear();
                self.leave(producer);
            }
        }
    }

    /// Messages become visible in the order they were made, each once.
    pub(super) fn seen_in_sequence(&mut self, offset: Offset, value: u64) -> Result<(), String> {
        let Some(sent) = self.producers.sent.get(&value).copied() else {
            return Ok(());
        };
        let last = std::mem::replace(&mut self.producers.all[sent.producer].seen, sent.message);
        if last < sent.message {
            return Ok(());
        }
        Err(self.fail(format!(
            "message {} of producer {} is seen at {offset}, after {last}",
            sent.message, sent.producer
        )))
    }

    /// After everything was mended: a producer that does not go on.
    pub(super) fn producers_stuck(&self) -> Option<String> {
        let stuck = |p: &Producer| p.unanswered.len() > IN_FLIGHT || p.acknowledged == 0;
        let at = self.producers.all.iter().position(stuck)?;
        Some(format!("producer {at} does not go on"))
    }

    fn take_strays(&mut self) {
        let (now, mut at) = (self.now, 0);
        while let Some((when, node, value)) = self.producers.strays.get(at).copied() {
            if when > now || !self.active(node) {
                at += 1;
                continue;
            }
            self.producers.strays.remove(at);
            self.serve(node, value);
        }
    }

    fn serve_calls(&mut self, producer: usize) {
        let now = self.now;
        let node = self.producers.all[producer].broker;
        if !self.active(node) {
            return;
        }
        for call in 0..self.producers.all[producer].calls.len() {
            let (value, mut state) = self.producers.all[producer].calls[call];
            if let State::Sent(at) = state {
                if at > now {
                    break;
                }
                state = self.serve(node, value);
            }
            if let State::Appended(offset, epoch) = state
                && let Some(reply) = self.reply(node, offset, epoch)
            {
                state = self.answer_at(reply);
            }
            self.producers.all[producer].calls[call].1 = state;
        }
    }

    fn answer_at(&mut self, reply: Reply) -> State {
        State::Answered(self.now + 1 + self.rng.below(5) as i64, reply)
    }

    /// A broker takes a batch.
    fn serve(&mut self, node: usize, value: u64) -> State {
        let (now, bug) = (self.now, self.bug);
        let sent = self.producers.sent[&value];
        let n = &mut self.nodes[node];
        let (end, epoch) = (n.log_end(), n.epoch);
        let Role::Leads(leader) = &n.role else {
            return self.answer_at(Reply::Elsewhere);
        };
        if leader.isr().len() < MIN_INSYNC {
            if bug != Bug::GapsAfterRefusal {
                n.handover = Handover::at(now, HANDOVER_MS);
            }
            return self.answer_at(Reply::Again);
        }
        if bug != Bug::GapsAfterHandover && n.handover.keeps_out(&n.producers, &sent.info(), now) {
            return self.answer_at(Reply::Elsewhere);
        }
        let state = match n.producers.check(&sent.header(end)) {
            Ok(SequenceCheck::New) => {
                n.append((epoch, value));
                self.note_producers(node, end);
                State::Appended(end, epoch)
            }
            Ok(SequenceCheck::Duplicate { base_offset, .. }) => {
                self.outcome.duplicates += 1;
                State::Appended(base_offset, epoch)
            }
            Err(AppendError::ProducerFenced { .. }) => self.answer_at(Reply::Fenced),
            Err(_) => self.answer_at(Reply::Gap),
        };
        self.tell(|_| {
            let is = match state {
                State::Appended(offset, _) if offset < end => format!("is there at {offset}"),
                State::Appended(offset, _) => format!("is appended at {offset}"),
                _ => "is refused".into(),
            };
            let Numbered {
                producer,
                message,
                epoch,
                sequence,
            } = sent;
            format!("message {message} of producer {producer}, epoch {epoch} sequence {sequence}, {is} by node {node}")
        });
        state
    }

    /// What is answered about a batch that stands there, once it can be.
    fn reply(&self, node: usize, offset: Offset, epoch: LeaderEpoch) -> Option<Reply> {
        let n = &self.nodes[node];
        match &n.role {
            Role::Leads(leader) if n.epoch == epoch => {
                if leader.isr().len() < MIN_INSYNC {
                    Some(Reply::Again)
                } else {
                    (n.high_watermark > offset).then_some(Reply::Acknowledged(offset))
                }
            }
            _ => Some(Reply::Elsewhere),
        }
    }

    fn take_answers(&mut self, producer: usize) -> Result<(), String> {
        let now = self.now;
        while let Some((value, State::Answered(at, reply))) = self.producers.all[producer].calls.front().copied() {
            if at > now {
                break;
            }
            let p = &mut self.producers.all[producer];
            p.calls.pop_front();
            p.heard = now;
            let message = self.producers.sent[&value].message;
            let place = p.unanswered.iter().position(|u| u.message == message);
            let first = p.unanswered.front().is_some_and(|u| u.message == message);
            // A later one was acknowledged meanwhile.
            let Some(place) = place else { continue };
            p.unanswered[place].asked = false;
            match reply {
                Reply::Acknowledged(offset) => {
                    // Older ones whose answers were lost, or said that it is not sure, are taken for acknowledged, too.
                    p.acknowledged += place + 1;
                    let older: Vec<u64> = p.unanswered.drain(..=place).map(|u| u.value).take(place).collect();
                    self.acknowledged_with(&older, offset)?;
                    self.acknowledged_at(offset, value)?;
                }
                Reply::Again => p.waits_until = now + 5,
                Reply::Elsewhere => {
                    p.waits_until = now + 5;
                    if self.rng.chance(2) {
                        self.leave(producer);
                    }
                }
                Reply::Gap if !first => p.drains = true,
                Reply::Gap | Reply::Fenced => {
                    let what = match reply {
                        Reply::Gap => "is refused for a gap, and nothing before it waits",
                        _ => "is fenced",
                    };
                    return Err(self.fail(format!("message {message} of producer {producer} {what}")));
                }
            }
        }
        Ok(())
    }

    fn acknowledged_with(&mut self, older: &[u64], newer: Offset) -> Result<(), String> {
        for value in older {
            let at = self.visible.range(..newer).rev().find(|(_, v)| *v == value);
            match at.map(|(at, _)| *at) {
                Some(at) => self.acknowledged_at(at, *value)?,
                None => {
                    let Numbered { producer, message, .. } = self.producers.sent[value];
                    return Err(self.fail(format!(
                        "message {message} of producer {producer} is missing before {newer}, where a later one was acknowledged"
                    )));
                }
            }
        }
        Ok(())
    }

    fn produce_more(&mut self, producer: usize) {
        let (now, faults) = (self.now, self.faults);
        let p = &self.producers.all[producer];
        let silent = !p.calls.is_empty() && now - p.heard > PATIENCE_MS;
        if silent || faults && self.rng.chance(400) {
            self.leave(producer);
        }
        // It asks another node now and then who leads, when it is not answered well.
        let p = &self.producers.all[producer];
        if p.calls.is_empty() && p.waits_until > now - 20 && self.rng.chance(5) {
            let guess = match self.leader() {
                Some(leader) if !self.rng.chance(4) => leader,
                _ => self.rng.below(self.nodes.len() as u64) as usize,
            };
            self.producers.all[producer].broker = guess;
        }
        if !self.active(self.producers.all[producer].broker) && self.producers.all[producer].calls.is_empty() {
            self.producers.all[producer].waits_until = now + 5;
            return;
        }
        let p = &mut self.producers.all[producer];
        if p.drains && p.calls.is_empty() {
            p.drains = false;
            p.epoch += 1;
            p.sequence = 0;
            for u in &mut p.unanswered {
                u.value = self.next_value;
                self.next_value += 1;
                let numbered = Numbered {
                    producer,
                    message: u.message,
                    epoch: p.epoch,
                    sequence: p.sequence,
                };
                p.sequence += 1;
                self.producers.sent.insert(u.value, numbered);
            }
            self.outcome.renumberings += 1;
            self.tell(|_| format!("producer {producer} numbers anew"));
        }
        let p = &mut self.producers.all[producer];
        if p.drains || p.calls.len() >= IN_FLIGHT || p.waits_until > now {
            return;
        }
        if p.unanswered.len() < IN_FLIGHT && self.rng.chance(if faults { 3 } else { 8 }) {
            p.messages += 1;
            let value = self.next_value;
            self.next_value += 1;
            let numbered = Numbered {
                producer,
                message: p.messages,
                epoch: p.epoch,
                sequence: p.sequence,
            };
            p.sequence += 1;
            p.unanswered.push_back(Unanswered {
                value,
                message: p.messages,
                asked: false,
            });
            self.producers.sent.insert(value, numbered);
        }
        if let Some(u) = p.unanswered.iter_mut().find(|u| !u.asked) {
            u.asked = true;
            let value = u.value;
            if p.calls.is_empty() {
                p.heard = now;
            }
            let last = p.calls.iter().rev().find_map(|(_, s)| match s {
                State::Sent(at) => Some(*at),
                _ => None,
            });
            let at = (now + 1 + self.rng.below(if faults { 10 } else { 2 }) as i64).max(last.unwrap_or(0));
            p.calls.push_back((value, State::Sent(at)));
        }
    }

    /// A producer's connection is no more: what is under way still comes, and is not answered.
    fn leave(&mut self, producer: usize) {
        let p = &mut self.producers.all[producer];
        for (value, state) in std::mem::take(&mut p.calls) {
            if let State::Sent(at) = state {
                self.producers.strays.push((at, p.broker, value));
            }
        }
        for u in &mut p.unanswered {
            u.asked = false;
        }
        p.waits_until = self.now + 5;
        self.tell(|_| format!("the connection of producer {producer} ends"));
    }
}
