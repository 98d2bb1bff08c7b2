//! Driver of the metadata quorum's member on shard 0: persists what it says in the metadata log, passes messages on, keeps its
//! clock, and hands every new image on. Decides nothing.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap},
    rc::Rc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use millrace_cluster::{
    controller::size,
    metadata::{Image, MetadataRecord, record},
    raft::{Outgoing, Quorum, QuorumConfig, QuorumError},
};
use millrace_engine::{
    AppendError, ReadError, StorageError,
    batch::PayloadFormat,
    host::Host,
    log::{LogConfig, LogState},
    shard::Shard,
    sync::WaitList,
};
use thiserror::Error;

use crate::{node::METADATA_KEY, peers::quorum_link::QuorumLink, router::Stopping};

/// The quorum's sense of time.
const TICK: Duration = Duration::from_millis(20);
/// Silence of a member whose process seems to have died after which that is believed.
const SUSPECTED_SILENCE: Duration = Duration::from_millis(100);
/// How long a change may take before whoever asked for it is told that it cannot be made now.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a node waits to hear what is agreed on before it answers by what it knows.
const CATCH_UP_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a quorum may be without a leader before nobody waits for one: elections take less, unless a majority is gone.
const ELECTION_PATIENCE: Duration = Duration::from_secs(2);
/// When it asks again meanwhile: a question is lost with the leader that it went to.
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// How long a proposal may be without an answer before it counts as lost and is made again.
const PROPOSAL_TIMEOUT: Duration = Duration::from_secs(1);

/// Why metadata cannot be changed.
#[derive(Debug, Error)]
pub enum MetadataError {
    /// An append failed.
    #[error("the metadata log takes no change: {0}")]
    Append(#[from] AppendError),
    /// It cannot be read.
    #[error("the metadata log cannot be read: {0}")]
    Read(#[from] ReadError),
    /// A flush failed.
    #[error("the metadata log takes no change: {0}")]
    Storage(#[from] StorageError),
    /// The quorum's member cannot go on.
    #[error(transparent)]
    Quorum(#[from] QuorumError),
    /// Records that do not decode.
    #[error(transparent)]
    Decode(#[from] record::DecodeError),
    /// Too few voters answer, or there is no leader among them.
    #[error("the metadata quorum does not answer: a majority of its nodes must run and reach each other")]
    NoQuorum,
    /// The broker is stopping.
    #[error(transparent)]
    Stopping(#[from] Stopping),
}

/// A member of the quorum.
pub struct QuorumDriver {
    quorum: RefCell<Quorum>,
    node_id: i32,
    started: Instant,
    /// Something for the member to do.
    work: WaitList,
    has_work: Cell<bool>,
    /// Image, leader, or the end of a proposal.
    changed: WaitList,
    /// Answers to questions for the index that is committed.
    indexes: RefCell<HashMap<u64, u64>>,
    /// Ends of this node's proposals.
    outcomes: RefCell<HashMap<u64, bool>>,
    next_id: Cell<u64>,
    links: RefCell<BTreeMap<i32, Rc<QuorumLink>>>,
    failed: RefCell<Option<String>>,
    leads: Cell<Option<Instant>>,
    leader: Cell<Option<i32>>,
    /// Since when no leader is heard of.
    leaderless: Cell<Option<Instant>>,
    /// Who led before this node.
    led_before: Cell<Option<i32>>,
    /// Members whose process seems to have died, and when that was noticed.
    suspected: RefCell<HashMap<i32, Instant>>,
}

/// Opens the metadata log, and returns the records in it.
///
/// # Errors
/// [`MetadataError`].
pub async fn open_log<H: Host>(engine: &Shard<H>, recovered: Option<LogState>) -> Result<Vec<Bytes>, MetadataError> {
    let config = LogConfig {
        segment_bytes: 4 << 20,
        retention_ms: -1,
        ..LogConfig::default()
    };
    engine.add_partition(recovered.unwrap_or_else(|| LogState::new(METADATA_KEY)), config);
    let mut stored = Vec::new();
    if let Some(log) = engine.partition(&METADATA_KEY) {
        engine
            .visit(METADATA_KEY, log.status().log_start, |batch| {
                if batch.header.format == PayloadFormat::Metadata {
                    stored.push(batch.payload.clone());
                }
                true
            })
            .await?;
    }
    Ok(stored)
}

/// Begins the metadata log of a new cluster.
///
/// # Errors
/// [`MetadataError`].
pub async fn begin_log<H: Host>(engine: &Shard<H>, founding: Vec<u8>) -> Result<Vec<Bytes>, MetadataError> {
    let bytes = Bytes::from(founding);
    persist(engine, bytes.clone()).await?;
    Ok(vec![bytes])
}

impl QuorumDriver {
    /// The member that the metadata log's records make. `start` is a number that no earlier start of this folder had.
    ///
    /// # Errors
    /// [`MetadataError`].
    pub fn new(
        stored: &[Bytes],
        node_id: i32,
        generation: u32,
        election_ms: i64,
        start: u64,
    ) -> Result<Self, MetadataError> {
        let tick_ms = TICK.as_millis() as i64;
        let config = QuorumConfig {
            node: node_id,
            generation,
            tick_ms,
            election_ms,
            heartbeat_ms: (election_ms / 5).max(tick_ms),
            seed: start ^ u64::from(std::process::id()),
        };
        Ok(Self {
            quorum: RefCell::new(Quorum::new(&config, stored)?),
            node_id,
            started: Instant::now(),
            work: WaitList::default(),
            has_work: Cell::new(true),
            changed: WaitList::default(),
            indexes: RefCell::default(),
            outcomes: RefCell::default(),
            // Unlike any that an earlier start has drawn.
            next_id: Cell::new(start << 32),
            links: RefCell::default(),
            failed: RefCell::default(),
            leads: Cell::new(None),
            leader: Cell::new(None),
            leaderless: Cell::new(Some(Instant::now())),
            led_before: Cell::new(None),
            suspected: RefCell::default(),
        })
    }

    fn now_ms(&self) -> i64 {
        self.started.elapsed().as_millis() as i64
    }

    /// Where messages to another member go; false if that is known already.
    pub fn add_link(&self, node: i32, link: &Rc<QuorumLink>) -> bool {
        let mut links = self.links.borrow_mut();
        let new = !links.contains_key(&node);
        links.entry(node).or_insert_with(|| Rc::clone(link));
        new
    }

    /// Takes away the links to those who are no members any more.
    pub fn keep_links(&self, stays: impl Fn(i32) -> bool) {
        self.links.borrow_mut().retain(|node, link| {
            let stays = stays(*node);
            if !stays {
                link.end();
            }
            stays
        });
    }

    /// Makes the members those that the metadata names, a step at a time.
    ///
    /// # Errors
    /// The library's.
    pub fn settle_members(&self) -> Result<(), QuorumError> {
        let settled = self.quorum.borrow_mut().settle_members();
        self.wake();
        settled
    }

    /// Looks at the member.
    pub fn with<T>(&self, look: impl FnOnce(&Quorum) -> T) -> T {
        look(&self.quorum.borrow())
    }

    /// The metadata as applied here.
    #[must_use]
    pub fn image(&self) -> Image {
        self.quorum.borrow().image().clone()
    }

    /// Whether this node leads the quorum.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.quorum.borrow().is_leader()
    }

    /// Whether it is of no use to wait for the quorum: it has been without a leader for longer than elections take, or this member takes
    /// no further part in it.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        let leaderless = || {
            self.leaderless
                .get()
                .is_some_and(|since| since.elapsed() >= ELECTION_PATIENCE)
        };
        let alone_or_led = |q: &Quorum| q.is_alone() || q.leader().is_some();
        self.failed.borrow().is_some() || (leaderless() && !self.with(alone_or_led))
    }

    /// Wakes at every new image, at every change of the leader, at the end of every proposal.
    #[must_use]
    pub fn changes(&self) -> &WaitList {
        &self.changed
    }

    /// How long another node has been silent, as far as this one, which leads, can say; `None` if it does not lead.
    #[must_use]
    pub fn silence(&self, node: i32) -> Option<Duration> {
        let since = self.leads.get()?;
        let heard = self.quorum.borrow().heard(node);
        let heard = heard.map(|ms| self.started + Duration::from_millis(ms as u64));
        // Before it led, this node heard of nobody but the leader.
        let last = match heard {
            Some(heard) if self.led_before.get() == Some(node) => heard,
            Some(heard) => heard.max(since),
            None => since,
        };
        Some(last.elapsed())
    }

    /// Another member's process seems to have died. If nothing is heard of it for a moment, and it leads, another is elected.
    pub async fn suspect<H: Host>(&self, host: &H, node: i32) {
        self.suspected.borrow_mut().insert(node, Instant::now());
        host.sleep(SUSPECTED_SILENCE).await;
        if !self.is_suspected(node) || self.quorum.borrow().leader() != Some(node) {
            return;
        }
        tracing::warn!(leader = node, "the metadata quorum's leader has died");
        self.quorum.borrow_mut().forget_leader();
        // Not all at once: the first one wins. Whoever is asked for a vote has noticed by then, too.
        let rank = {
            let (voters, _) = self.quorum.borrow().members();
            voters.iter().filter(|n| **n != node && **n < self.node_id).count()
        };
        host.sleep(TICK + TICK * 2 * rank as u32).await;
        let begun = self.quorum.borrow_mut().campaign();
        if let Err(error) = begun {
            tracing::warn!(%error, "no election could be begun");
        }
        self.wake();
    }

    /// Whether a member's process seems to have died, and nothing has been heard of it since.
    #[must_use]
    pub fn is_suspected(&self, node: i32) -> bool {
        let Some(since) = self.suspected.borrow().get(&node).copied() else {
            return false;
        };
        let heard = self.quorum.borrow().heard(node);
        let alive = heard.is_some_and(|ms| self.started + Duration::from_millis(ms as u64) > since);
        if alive {
            self.suspected.borrow_mut().remove(&node);
        }
        !alive && since.elapsed() >= SUSPECTED_SILENCE
    }

    /// Why this node takes no further part, if so.
    #[must_use]
    pub fn failed(&self) -> Option<String> {
        self.failed.borrow().clone()
    }

    fn fail(&self, error: String) {
        tracing::error!(error, "this node takes no further part in the metadata quorum");
        *self.failed.borrow_mut() = Some(error);
        self.changed.wake_all();
    }

    fn wake(&self) {
        self.has_work.set(true);
        self.work.wake_all();
    }

    /// A message of another member.
    ///
    /// # Errors
    /// It is none: whoever sent it should not be listened to any more.
    pub fn receive(&self, from: i32, bytes: &[u8]) -> Result<(), QuorumError> {
        let now = self.now_ms();
        let received = self.quorum.borrow_mut().receive(from, bytes, now);
        if let Err(error @ QuorumError::OldCopy { .. }) = &received {
            self.fail(error.to_string());
        }
        self.wake();
        received
    }

    /// Another member's process seems to have died.
    pub fn reconnect(&self, node: i32) {
        if let Some(link) = self.links.borrow().get(&node) {
            link.restart();
        }
    }

    /// Another member cannot be reached.
    pub fn unreachable(&self, node: i32) {
        self.quorum.borrow_mut().unreachable(node);
    }

    /// Gives the lead of the quorum to another voter, if there is one.
    pub fn hand_over(&self) {
        self.quorum.borrow_mut().hand_over();
        self.wake();
    }

    /// Decides a change on the latest image and has the quorum agree; `decide` returns its records and its answer, and is asked
    /// again if another change was first. Returns the answer, and the version of the image that it is true of.
    ///
    /// # Errors
    /// [`MetadataError`]; the change may then be made later, or not.
    pub async fn change<H: Host, T>(
        &self,
        host: &H,
        decide: impl Fn(&Image) -> (Vec<MetadataRecord>, T),
    ) -> Result<(T, u64), MetadataError> {
        let begun = Instant::now();
        while begun.elapsed() < CHANGE_TIMEOUT {
            self.check()?;
            let image = self.image();
            let (records, answer) = decide(&image);
            if records.is_empty() {
                return Ok((answer, image.version));
            }
            let id = self.next_id.get();
            self.next_id.set(id + 1);
            let proposed = self.quorum.borrow_mut().propose(id, image.version, records);
            match proposed {
                Ok(()) => self.wake(),
                // Nobody leads now; somebody soon may.
                Err(QuorumError::Raft(_)) => {
                    host.sleep(TICK).await;
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            let ended = self.changed.wait(|| {
                let outcome = self.outcomes.borrow_mut().remove(&id);
                outcome
                    .map(Some)
                    .or_else(|| self.failed.borrow().is_some().then_some(None))
            });
            let ended = futures_lite::future::or(ended, async {
                host.sleep(PROPOSAL_TIMEOUT).await;
                None
            });
            if ended.await == Some(true) {
                return Ok((answer, self.quorum.borrow().image().version));
            }
        }
        Err(MetadataError::NoQuorum)
    }

    /// Has what `decide` wants agreed on, in as many changes as it takes: what each leaves undone it is asked for again.
    ///
    /// # Errors
    /// [`MetadataError`]; some of it may be made then.
    pub async fn change_in_parts<H: Host>(
        &self,
        host: &H,
        decide: impl Fn(&Image) -> Vec<MetadataRecord>,
    ) -> Result<u64, MetadataError> {
        let part = |image: &Image| {
            let mut records = decide(image);
            let is_part = size::take_part(&mut records);
            (records, is_part)
        };
        loop {
            let (is_part, version) = self.change(host, part).await?;
            if !is_part {
                return Ok(version);
            }
        }
    }

    /// Waits until this member has applied all that was agreed on, anywhere, before it was called; returns the image's version then.
    /// `None` if the quorum does not say in time.
    pub async fn catch_up<H: Host>(&self, host: &H) -> Option<u64> {
        if self.quorum.borrow().is_alone() {
            return Some(self.quorum.borrow().image().version);
        }
        let asks = CATCH_UP_TIMEOUT.as_millis() / ASK_AGAIN.as_millis();
        let mut asked = Vec::new();
        for _ in 0..asks {
            let id = self.next_id.get();
            self.next_id.set(id + 1);
            self.quorum.borrow_mut().ask_index(id);
            self.wake();
            asked.push(id);
            let caught_up = self.changed.wait(|| {
                let indexes = self.indexes.borrow();
                let index = asked.iter().find_map(|id| indexes.get(id))?;
                let quorum = self.quorum.borrow();
                (quorum.applied_index() >= *index).then(|| quorum.image().version)
            });
            let patience = async {
                host.sleep(ASK_AGAIN).await;
                None
            };
            let version = futures_lite::future::or(async { Some(caught_up.await) }, patience).await;
            if version.is_some() {
                return version;
            }
        }
        None
    }

    fn check(&self) -> Result<(), MetadataError> {
        match &*self.failed.borrow() {
            Some(stage) => Err(StorageError::Poisoned { stage: stage.clone() }.into()),
            None => Ok(()),
        }
    }

    /// Lets time pass, as long as there are others to wait for.
    pub async fn run_clock<H: Host>(&self, host: &H, stopping: impl Fn() -> bool) {
        while !stopping() {
            if self.quorum.borrow().is_alone() {
                host.sleep(Duration::from_millis(500)).await;
                continue;
            }
            host.sleep(TICK).await;
            self.quorum.borrow_mut().tick();
            let leaderless = self.with(|q| q.leader().is_none());
            self.leaderless
                .set(leaderless.then(|| self.leaderless.get().unwrap_or_else(Instant::now)));
            self.wake();
        }
    }

    /// Runs the member until its log fails.
    pub async fn run<H: Host>(&self, engine: &Shard<H>) {
        loop {
            self.work.wait(|| self.has_work.replace(false).then_some(())).await;
            if self.failed.borrow().is_some() {
                return;
            }
            if let Err(error) = self.steps(engine).await {
                return self.fail(error.to_string());
            }
        }
    }

    async fn steps<H: Host>(&self, engine: &Shard<H>) -> Result<(), MetadataError> {
        loop {
            let Some(begun) = self.quorum.borrow_mut().begin() else {
                return Ok(());
            };
            self.send(begun.send);
            if let Some(bytes) = begun.persist {
                persist(engine, bytes.into()).await?;
            }
            let finished = self.quorum.borrow_mut().finish()?;
            self.send(finished.send);
            let mut news = finished.restored;
            for applied in finished.applied {
                news = true;
                if applied.by == self.node_id {
                    self.outcomes.borrow_mut().insert(applied.id, applied.counts);
                }
            }
            news |= !finished.indexes.is_empty();
            self.indexes.borrow_mut().extend(finished.indexes);
            news |= self.note_leader();
            if news {
                self.changed.wake_all();
                // What nobody waits for any more.
                let next = self.next_id.get();
                self.outcomes.borrow_mut().retain(|id, _| id + 1_000 > next);
                self.indexes.borrow_mut().retain(|id, _| id + 1_000 > next);
            }
            let compact = self.quorum.borrow_mut().compact();
            if let Some(bytes) = compact {
                let start = persist(engine, bytes.into()).await?;
                if let Some(log) = engine.partition(&METADATA_KEY) {
                    engine.delete_records(&log, start).await?;
                }
            }
        }
    }

    fn note_leader(&self) -> bool {
        let (leader, term, leads) = {
            let quorum = self.quorum.borrow();
            (quorum.leader(), quorum.term(), quorum.is_leader())
        };
        if leads && self.leads.get().is_none() {
            self.leads.set(Some(Instant::now()));
            tracing::info!(term, "this node leads the metadata quorum");
        } else if !leads && self.leads.take().is_some() {
            tracing::info!(term, "this node leads the metadata quorum no more");
        }
        if leader.is_none() || leader == self.leader.get() {
            return false;
        }
        let before = self.leader.replace(leader);
        self.led_before.set(before.filter(|n| *n != self.node_id));
        if let Some(leader) = leader.filter(|n| *n != self.node_id) {
            tracing::info!(leader, term, "the metadata quorum has a leader");
        }
        true
    }

    fn send(&self, messages: Vec<Outgoing>) {
        let links = self.links.borrow();
        for message in messages {
            if let Some(link) = links.get(&message.node) {
                link.send(Bytes::from(message.bytes));
            }
        }
    }
}

/// Appends bytes to the metadata log, durably; returns their offset.
async fn persist<H: Host>(engine: &Shard<H>, bytes: Bytes) -> Result<i64, MetadataError> {
    let permit = engine.admit(bytes.len()).await;
    let appended = engine.append_metadata(METADATA_KEY, 0, bytes, permit)?;
    if let Some(log) = engine.partition(&METADATA_KEY) {
        log.wait_durable(appended.end_offset).await?;
    }
    Ok(appended.base_offset)
}
