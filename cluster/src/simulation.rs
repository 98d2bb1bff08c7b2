//! Histories of one replicated partition, drawn from a seed: a leader, its followers and the controller's decisions are the very
//! code that brokers run; logs, network and time are models. Nodes crash and forget what was not durable, are paused until
//! they are fenced, lose connections, learn of metadata late; then everything is mended and progress is demanded.
//!
//! Checked after every step:
//!
//! 1. What was acknowledged with acks=all stands at its offset in the log of whoever leads, for ever.
//! 2. No offset below a leader's high watermark is ever seen with two values, and a leader's high watermark is backed by its log.
//! 3. Two nodes never lead under one epoch.
//! 4. Nobody is asked to cut below its high watermark.
//!
//! The same seed gives the same history. [`Bug`] plants one, to show that it would be found.

use std::collections::{BTreeMap, VecDeque};

use millrace_engine::{LeaderEpoch, Offset, log::EpochCache};
use uuid::Uuid;

use crate::{
    controller::brokers::{self, IsrChange},
    metadata::{Image, MetadataRecord, PartitionImage, Registration},
    replica::{
        Answer, Leader, Next, Request,
        follower::{self, Decision, Log},
        message::{Order, Says},
    },
};

const TOPIC: Uuid = Uuid::from_u128(1);
const MIN_INSYNC: usize = 2;
/// Silence after which the controller fences a node, ms.
const SESSION_MS: i64 = 100;
const LAG_MS: i64 = 150;

/// A known mistake, planted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    /// None.
    None,
    /// The high watermark follows the leader's own log.
    HighWatermarkEarly,
    /// A new follower cuts its log at its own high watermark, as Kafka did before KIP-101.
    TruncateToHighWatermark,
    /// A follower answers before what it was sent is durable.
    AckBeforeFlush,
}

/// What a history came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    /// Records acknowledged.
    pub acknowledged: usize,
    /// Leaderships that began.
    pub elections: usize,
    /// Logs cut.
    pub cuts: usize,
    /// Hash of everything that happened.
    pub trace: u64,
}

/// xorshift64*.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

/// Takes in what happens.
type Tell = Box<dyn FnMut(String)>;
/// A record: the epoch it was written under, and what it says.
type Entry = (LeaderEpoch, u64);

enum Role {
    None,
    Leads(Leader),
    Follows(i32),
}

struct Node {
    up: bool,
    paused_until: i64,
    log: Vec<Entry>,
    epochs: EpochCache,
    durable: usize,
    high_watermark: Offset,
    /// Below this its log was compared with what others showed.
    checked: Offset,
    epoch: LeaderEpoch,
    role: Role,
    /// Metadata that it has not taken in yet: when it comes, and what.
    news: VecDeque<(i64, PartitionImage)>,
    started: u64,
    /// Appends that are to be answered when they are durable: log end, to whom, what was asked.
    appends: VecDeque<(Offset, usize, Request)>,
}

impl Node {
    fn append(&mut self, entry: Entry) {
        self.epochs.note(entry.0, self.log_end());
        self.log.push(entry);
    }

    fn look(&self) -> Log<'_> {
        Log {
            log_start: 0,
            log_end: self.log_end(),
            durable_end: self.durable as Offset,
            epochs: &self.epochs,
        }
    }

    fn log_end(&self) -> Offset {
        self.log.len() as Offset
    }

    fn cut(&mut self, to: Offset) {
        self.log.truncate(to as usize);
        self.epochs.trim_end(to);
        self.checked = self.checked.min(to);
        self.durable = self.durable.min(self.log.len());
        self.high_watermark = self.high_watermark.min(to);
    }
}

enum Message {
    /// With the offset of the first entry that it brings.
    Request(Request, Option<Offset>, Vec<Entry>),
    Answer(Answer),
}

/// A produce request that waits for its acknowledgement.
struct Waiting {
    node: usize,
    epoch: LeaderEpoch,
    offset: Offset,
    value: u64,
}

struct World {
    rng: Rng,
    bug: Bug,
    now: i64,
    nodes: Vec<Node>,
    image: Image,
    /// When the controller last heard of a node.
    heard: Vec<i64>,
    /// Between two nodes in order, until the connection breaks.
    links: BTreeMap<(usize, usize), VecDeque<(i64, Message)>>,
    waiting: Vec<Waiting>,
    next_value: u64,
    acknowledged: BTreeMap<Offset, u64>,
    visible: BTreeMap<Offset, u64>,
    leaders: BTreeMap<LeaderEpoch, usize>,
    /// The last leadership whose log was compared with all that was acknowledged.
    looked_through: Option<LeaderEpoch>,
    faults: bool,
    outcome: Outcome,
    tell: Option<Tell>,
}

/// Runs a history.
///
/// # Errors
/// What was violated, and when.
pub fn run(seed: u64, bug: Bug) -> Result<Outcome, String> {
    World::new(seed, bug, None).live()
}

/// Runs a history and tells what happens in it.
///
/// # Errors
/// What was violated, and when.
pub fn explain(seed: u64, bug: Bug, tell: impl FnMut(String) + 'static) -> Result<Outcome, String> {
    World::new(seed, bug, Some(Box::new(tell))).live()
}

fn registration(node: i32, start: u64) -> Registration {
    Registration {
        node,
        incarnation: u128::from(start).to_be_bytes(),
        directory: [node as u8; 16],
        clients: Vec::new(),
        peers: Vec::new(),
        rack: None,
    }
}

impl World {
    /// The whole history: faults, then none.
    fn live(mut self) -> Result<Outcome, String> {
        for _ in 0..1_500 {
            self.step()?;
        }
        self.mend();
        let before = self.outcome.acknowledged;
        for _ in 0..2_500 {
            self.step()?;
        }
        if self.outcome.acknowledged == before {
            return Err(self.fail("nothing was acknowledged after everything was mended".into()));
        }
        let isr = self.partition().isr.len();
        if isr != self.nodes.len() {
            return Err(self.fail(format!("only {isr} replicas are in sync after everything was mended")));
        }
        Ok(self.outcome)
    }

    fn new(seed: u64, bug: Bug, tell: Option<Tell>) -> Self {
        let mut rng = Rng(seed.wrapping_mul(2).wrapping_add(1));
        let count = if rng.chance(3) { 5 } else { 3 };
        let nodes: Vec<i32> = (0..count).collect();
        let mut records: Vec<MetadataRecord> = nodes
            .iter()
            .map(|n| MetadataRecord::Broker(registration(*n, 0)))
            .collect();
        records.push(MetadataRecord::Topic {
            id: TOPIC.into_bytes(),
            name: "t".into(),
        });
        records.push(MetadataRecord::Partition {
            topic: TOPIC.into_bytes(),
            partition: 0,
            replicas: nodes.clone(),
            isr: nodes.clone(),
            leader: 0,
            leader_epoch: 0,
            partition_epoch: 0,
        });
        let image = Image::default().apply(&records);
        let mut world = Self {
            rng,
            bug,
            now: 0,
            nodes: nodes
                .iter()
                .map(|_| Node {
                    up: true,
                    paused_until: 0,
                    log: Vec::new(),
                    epochs: EpochCache::default(),
                    durable: 0,
                    high_watermark: 0,
                    checked: 0,
                    epoch: -1,
                    role: Role::None,
                    news: VecDeque::new(),
                    started: 0,
                    appends: VecDeque::new(),
                })
                .collect(),
            heard: vec![0; nodes.len()],
            image: Image::default(),
            links: BTreeMap::new(),
            waiting: Vec::new(),
            next_value: 1,
            acknowledged: BTreeMap::new(),
            visible: BTreeMap::new(),
            leaders: BTreeMap::new(),
            looked_through: None,
            faults: true,
            outcome: Outcome::default(),
            tell,
        };
        world.commit(image);
        world
    }

    fn partition(&self) -> PartitionImage {
        self.image.partition(&TOPIC, 0).expect("it is never deleted").clone()
    }

    fn fail(&self, what: String) -> String {
        let nodes: Vec<String> = (self.nodes.iter())
            .map(|n| {
                let role = match &n.role {
                    Role::None => "nothing".into(),
                    Role::Leads(_) => "leads".into(),
                    Role::Follows(leader) => format!("follows {leader}"),
                };
                format!(
                    "{role} epoch {} log end {} durable {} high watermark {}",
                    n.epoch,
                    n.log.len(),
                    n.durable,
                    n.high_watermark
                )
            })
            .collect();
        format!(
            "at {} ms: {what}; {:?}; {}",
            self.now,
            self.partition(),
            nodes.join(" | ")
        )
    }

    /// Text is made only if somebody may want it: most histories are run for their end alone.
    fn tell(&mut self, what: impl FnOnce(&Self) -> String) {
        if let Some(mut tell) = self.tell.take() {
            tell(format!("{:5} {}", self.now, what(self)));
            self.tell = Some(tell);
        }
    }

    fn trace(&mut self, what: u64) {
        self.outcome.trace = (self.outcome.trace ^ what)
            .wrapping_mul(0x0100_0000_01b3)
            .rotate_left(5);
    }

    /// The controller's change is agreed on; nodes learn of it sooner or later, in order.
    fn commit(&mut self, image: Image) {
        self.image = image;
        let partition = self.partition();
        self.tell(|w| {
            format!(
                "committed {:?}, active {:?}",
                w.partition(),
                w.image.active().collect::<Vec<_>>()
            )
        });
        for node in 0..self.nodes.len() {
            // A broker takes up no metadata from before its registration: it might lead under an epoch that it has forgotten.
            if !self.nodes[node].up {
                continue;
            }
            let delay = self.rng.below(if self.faults { 25 } else { 3 }) as i64;
            let last = self.nodes[node].news.back().map_or(0, |(at, _)| *at);
            self.nodes[node]
                .news
                .push_back(((self.now + delay).max(last), partition.clone()));
        }
    }

    fn change(&mut self, records: &[MetadataRecord]) {
        if !records.is_empty() {
            let next = self.image.apply(records);
            self.commit(next);
        }
    }

    fn mend(&mut self) {
        self.faults = false;
        for node in 0..self.nodes.len() {
            self.nodes[node].paused_until = 0;
            if !self.nodes[node].up {
                self.start(node);
            }
        }
    }

    fn active(&self, node: usize) -> bool {
        self.nodes[node].up && self.nodes[node].paused_until <= self.now
    }

    fn step(&mut self) -> Result<(), String> {
        self.now += 1;
        if self.faults {
            self.fault();
        }
        for node in 0..self.nodes.len() {
            if self.active(node) {
                self.heard[node] = self.now;
                self.learn(node)?;
                self.flush(node);
                self.tick(node);
            }
        }
        self.deliver()?;
        for node in 0..self.nodes.len() {
            if self.active(node) {
                self.push(node);
            }
        }
        self.produce();
        self.acknowledge()?;
        self.fence();
        self.check()
    }

    fn fault(&mut self) {
        let node = self.rng.below(self.nodes.len() as u64) as usize;
        match self.rng.below(300) {
            0 if self.nodes[node].up => self.crash(node),
            1 | 2 if !self.nodes[node].up => self.start(node),
            3 => {
                self.nodes[node].paused_until = self.now + self.rng.below(300) as i64;
                self.tell(|w| format!("node {node} is paused until {}", w.nodes[node].paused_until));
            }
            // A whole rack, or all of them: power is gone.
            7 if self.rng.chance(2) => {
                let all = self.rng.chance(2);
                for other in 0..self.nodes.len() {
                    if self.nodes[other].up && (all || other != node) {
                        self.crash(other);
                    }
                }
            }
            4..7 => {
                let other = self.rng.below(self.nodes.len() as u64) as usize;
                self.cut_link(node, other);
            }
            _ => {}
        }
    }

    fn crash(&mut self, node: usize) {
        let extra = self.nodes[node].log.len() - self.nodes[node].durable;
        let kept = self.nodes[node].durable + self.rng.below(extra as u64 + 1) as usize;
        let n = &mut self.nodes[node];
        n.up = false;
        n.cut(kept as Offset);
        n.durable = n.log.len();
        n.high_watermark = 0;
        n.role = Role::None;
        n.epoch = -1;
        n.news.clear();
        n.appends.clear();
        for other in 0..self.nodes.len() {
            self.cut_link(node, other);
        }
        self.waiting.retain(|w| w.node != node);
        self.trace(node as u64);
        self.tell(|w| format!("node {node} crashes, its log ends at {}", w.nodes[node].log.len()));
    }

    fn start(&mut self, node: usize) {
        self.nodes[node].up = true;
        self.nodes[node].started += 1;
        self.register(node);
    }

    fn register(&mut self, node: usize) {
        self.heard[node] = self.now;
        let records = brokers::register(&self.image, &registration(node as i32, self.nodes[node].started));
        self.change(&records.expect("the folder is the same"));
    }

    /// A connection breaks: what was on its way is lost, and the side that leads notices.
    fn cut_link(&mut self, a: usize, b: usize) {
        self.tell(|_| format!("the connection of {a} and {b} breaks"));
        self.links.remove(&(a, b));
        self.links.remove(&(b, a));
        for (leader, follower) in [(a, b), (b, a)] {
            if let Role::Leads(state) = &mut self.nodes[leader].role {
                state.lost(follower as i32);
            }
        }
    }

    fn send(&mut self, from: usize, to: usize, message: Message) {
        let delay = 1 + self.rng.below(if self.faults { 15 } else { 2 }) as i64;
        let queue = self.links.entry((from, to)).or_default();
        let last = queue.back().map_or(0, |(at, _)| *at);
        queue.push_back(((self.now + delay).max(last), message));
    }

    /// Takes in metadata that has come.
    fn learn(&mut self, node: usize) -> Result<(), String> {
        while self.nodes[node].news.front().is_some_and(|(at, _)| *at <= self.now) {
            let Some((_, image)) = self.nodes[node].news.pop_front() else {
                break;
            };
            self.tell(|w| {
                let n = &w.nodes[node];
                format!(
                    "node {node}, log end {} high watermark {}, learns {image:?}",
                    n.log_end(),
                    n.high_watermark
                )
            });
            let now = self.now;
            let bug = self.bug;
            let n = &mut self.nodes[node];
            let me = node as i32;
            let same = std::mem::replace(&mut n.epoch, image.leader_epoch) == image.leader_epoch;
            if image.leader == me {
                if let (Role::Leads(leader), true) = (&mut n.role, same) {
                    leader.committed(&image.replicas, &image.isr, image.partition_epoch, now);
                    continue;
                }
                // What was appended as a follower is made durable first.
                n.durable = n.log.len();
                n.appends.clear();
                let mut leader = Leader::new(me, image.leader_epoch, n.log_end(), n.high_watermark, LAG_MS);
                leader.local(n.log_end(), n.durable as Offset);
                leader.committed(&image.replicas, &image.isr, image.partition_epoch, now);
                n.role = Role::Leads(leader);
                n.checked = 0;
                self.outcome.elections += 1;
                if let Some(other) = self.leaders.insert(image.leader_epoch, node)
                    && other != node
                {
                    return Err(self.fail(format!("nodes {other} and {node} lead epoch {}", image.leader_epoch)));
                }
            } else if !matches!(n.role, Role::Follows(leader) if same && leader == image.leader) {
                n.role = Role::Follows(image.leader);
                if bug == Bug::TruncateToHighWatermark {
                    let to = n.high_watermark;
                    n.cut(to);
                }
            }
        }
        Ok(())
    }

    fn flush(&mut self, node: usize) {
        if !self.rng.chance(3) {
            return;
        }
        let extra = self.nodes[node].log.len() - self.nodes[node].durable;
        if extra == 0 {
            return;
        }
        let more = 1 + self.rng.below(extra as u64) as usize;
        self.nodes[node].durable += more;
        self.answer_appends(node);
    }

    /// Answers the appends that are durable by now.
    fn answer_appends(&mut self, node: usize) {
        let bug = self.bug;
        let n = &mut self.nodes[node];
        let durable = if bug == Bug::AckBeforeFlush {
            n.log_end()
        } else {
            n.durable as Offset
        };
        let mut answers = Vec::new();
        while n.appends.front().is_some_and(|(end, _, _)| *end <= durable) {
            answers.extend(n.appends.pop_front());
        }
        for (end, to, request) in answers {
            self.answer(node, to, &request, Says::Durable(end));
        }
    }

    fn answer(&mut self, node: usize, to: usize, request: &Request, says: Says) {
        let answer = Answer {
            key: request.key,
            epoch: request.epoch,
            round: request.round,
            says,
        };
        self.send(node, to, Message::Answer(answer));
    }

    /// A leader looks at its own log and at its ISR.
    fn tick(&mut self, node: usize) {
        let (now, bug) = (self.now, self.bug);
        let image = &self.image;
        let n = &mut self.nodes[node];
        let (log_end, durable) = (n.log_end(), n.durable as Offset);
        let epoch = n.epoch;
        let Role::Leads(leader) = &mut n.role else { return };
        leader.local(log_end, durable);
        n.high_watermark = n.high_watermark.max(match bug {
            Bug::HighWatermarkEarly => durable,
            _ => leader.high_watermark(),
        });
        let Some(wish) = leader.isr_wish(now, |other| image.is_active(other)) else {
            return;
        };
        let change = IsrChange {
            topic: TOPIC,
            partition: 0,
            leader_epoch: epoch,
            partition_epoch: wish.partition_epoch,
            isr: wish.isr,
        };
        // The request may be lost, and so may its answer.
        let records = if self.faults && self.rng.chance(6) {
            Vec::new()
        } else {
            brokers::alter_isr(&self.image, node as i32, &[change])
        };
        if records.is_empty()
            && let Role::Leads(leader) = &mut self.nodes[node].role
        {
            leader.wish_refused();
        }
        self.change(&records);
    }

    /// A leader sends what is due.
    fn push(&mut self, node: usize) {
        let n = &mut self.nodes[node];
        let (epoch, high_watermark) = (n.epoch, n.high_watermark);
        let Role::Leads(leader) = &mut n.role else { return };
        let mut requests = Vec::new();
        let followers: Vec<i32> = leader.followers().collect();
        for follower in followers {
            leader.owes_note(follower);
            while let Some(next) = leader.next(follower) {
                let (round, order, batch) = match next {
                    Next::Order { round, order } => (round, order, Vec::new()),
                    Next::Batches { round, from } => {
                        let some: Vec<Entry> = n.log[from as usize..].iter().take(4).copied().collect();
                        let end = from + some.len() as Offset;
                        leader.sent(follower, round, end, some.len());
                        (round, Order::Append, some)
                    }
                };
                let first = match next {
                    Next::Batches { from, .. } => Some(from),
                    Next::Order { .. } => None,
                };
                let request = Request {
                    key: millrace_engine::PartitionKey {
                        topic: TOPIC,
                        partition: 0,
                    }
                    .into(),
                    epoch,
                    round,
                    high_watermark,
                    log_start: 0,
                    order,
                };
                requests.push((follower as usize, Message::Request(request, first, batch)));
            }
        }
        for (to, message) in requests {
            self.send(node, to, message);
        }
    }

    fn deliver(&mut self) -> Result<(), String> {
        let links: Vec<(usize, usize)> = self.links.keys().copied().collect();
        for (from, to) in links {
            while self.active(to)
                && let Some(queue) = self.links.get_mut(&(from, to))
                && queue.front().is_some_and(|(at, _)| *at <= self.now)
                && let Some((_, message)) = queue.pop_front()
            {
                self.tell(|_| match &message {
                    Message::Request(r, first, _) => format!(
                        "{from} -> {to} epoch {} round {} {:?} {first:?} high watermark {}",
                        r.epoch, r.round, r.order, r.high_watermark
                    ),
                    Message::Answer(a) => format!("{from} -> {to} epoch {} round {} {:?}", a.epoch, a.round, a.says),
                });
                match message {
                    Message::Request(request, first, batch) => self.follow(to, from, request, first, batch)?,
                    Message::Answer(answer) => self.answered(to, from, &answer),
                }
            }
        }
        Ok(())
    }

    fn follow(
        &mut self,
        node: usize,
        from: usize,
        request: Request,
        first: Option<Offset>,
        batch: Vec<Entry>,
    ) -> Result<(), String> {
        let n = &mut self.nodes[node];
        let follows = match n.role {
            Role::Follows(leader) => Some(leader),
            _ => None,
        };
        let decision = follower::decide(&request, from as i32, first, (follows, n.epoch), n.look());
        match decision {
            Decision::Answer(says) => {
                self.answer(node, from, &request, says);
                return Ok(());
            }
            Decision::Note => {}
            Decision::Truncate { to } | Decision::Restart { at: to } => {
                if to < n.high_watermark {
                    let text = format!("node {node} is to cut at {to}, below its high watermark");
                    return Err(self.fail(text));
                }
                n.cut(to);
                n.appends.clear();
                self.outcome.cuts += 1;
                let says = Says::Stands(self.nodes[node].look().standing());
                self.answer(node, from, &request, says);
                return Ok(());
            }
            Decision::Append => {
                batch.into_iter().for_each(|entry| n.append(entry));
                let end = n.log_end();
                n.appends.push_back((end, from, request.clone()));
                self.answer_appends(node);
            }
        }
        let n = &mut self.nodes[node];
        n.high_watermark = n.high_watermark.max(request.high_watermark.min(n.durable as Offset));
        Ok(())
    }

    fn answered(&mut self, node: usize, from: usize, answer: &Answer) {
        let now = self.now;
        let n = &mut self.nodes[node];
        if n.epoch != answer.epoch {
            return;
        }
        if let Role::Leads(leader) = &mut n.role {
            leader.answered(from as i32, answer.round, answer.says, &n.epochs, 0, now);
        }
    }

    /// A producer sends a record to whoever believes to lead, gone by or not.
    fn produce(&mut self) {
        let node = self.rng.below(self.nodes.len() as u64) as usize;
        if !self.active(node) || !self.rng.chance(2) {
            return;
        }
        let value = self.next_value;
        let n = &mut self.nodes[node];
        let Role::Leads(leader) = &n.role else { return };
        if leader.isr().len() < MIN_INSYNC {
            return;
        }
        self.next_value += 1;
        let waiting = Waiting {
            node,
            epoch: n.epoch,
            offset: n.log_end(),
            value,
        };
        n.append((n.epoch, value));
        self.waiting.push(waiting);
    }

    fn acknowledge(&mut self) -> Result<(), String> {
        let mut still = Vec::new();
        for w in std::mem::take(&mut self.waiting) {
            let n = &self.nodes[w.node];
            let in_sync = match &n.role {
                Role::Leads(leader) if n.epoch == w.epoch => leader.isr().len(),
                // The leadership is over: whether it was written, nobody can say.
                _ => continue,
            };
            if !self.active(w.node) || n.high_watermark <= w.offset {
                still.push(w);
                continue;
            }
            if in_sync < MIN_INSYNC {
                continue;
            }
            self.outcome.acknowledged += 1;
            if let Some(other) = self.acknowledged.insert(w.offset, w.value) {
                return Err(self.fail(format!(
                    "offset {} was acknowledged as {other} and as {}",
                    w.offset, w.value
                )));
            }
            if let Some(leader) = self.leader() {
                self.holds(leader, w.offset, w.value)?;
            }
        }
        self.waiting = still;
        self.trace(self.outcome.acknowledged as u64);
        Ok(())
    }

    /// Who leads under the latest epoch, and knows it.
    fn leader(&self) -> Option<usize> {
        let current = self.image.partition(&TOPIC, 0)?;
        let leader = usize::try_from(current.leader).ok()?;
        let n = &self.nodes[leader];
        (matches!(n.role, Role::Leads(_)) && n.epoch == current.leader_epoch).then_some(leader)
    }

    /// Fails unless a node's log has a record that was acknowledged.
    fn holds(&self, node: usize, offset: Offset, value: u64) -> Result<(), String> {
        match self.nodes[node].log.get(offset as usize) {
            Some((_, found)) if *found == value => Ok(()),
            _ => Err(self.fail(format!(
                "record {value} was acknowledged at {offset} and is not in the log of leader {node}"
            ))),
        }
    }

    /// The controller fences who is silent, and who was fenced and is back registers again.
    fn fence(&mut self) {
        for node in 0..self.nodes.len() {
            let id = node as i32;
            if self.image.is_active(id) && self.now - self.heard[node] > SESSION_MS {
                let records = brokers::fence(&self.image, id);
                self.change(&records);
            } else if !self.image.is_active(id) && self.active(node) && self.rng.chance(10) {
                self.register(node);
            }
        }
    }

    fn check(&mut self) -> Result<(), String> {
        for node in 0..self.nodes.len() {
            let n = &mut self.nodes[node];
            let Role::Leads(_) = n.role else { continue };
            let (from, to) = (n.checked, n.high_watermark);
            n.checked = to;
            if to > n.log_end() {
                return Err(self.fail(format!("node {node} has a high watermark beyond its log")));
            }
            for offset in from..to {
                let value = self.nodes[node].log[offset as usize].1;
                let known = *self.visible.entry(offset).or_insert(value);
                if known != value {
                    return Err(self.fail(format!(
                        "offset {offset} was seen as {known}, node {node} shows {value}"
                    )));
                }
            }
        }
        // All of it when a leadership begins; what is acknowledged later is looked for when it is.
        if let Some(leader) = self.leader()
            && self.looked_through.replace(self.nodes[leader].epoch) != Some(self.nodes[leader].epoch)
        {
            for (offset, value) in &self.acknowledged {
                self.holds(leader, *offset, *value)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_history_twice() {
        for seed in 0..20 {
            assert_eq!(run(seed, Bug::None), run(seed, Bug::None));
        }
    }
}
