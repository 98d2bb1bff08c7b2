//! Driver of the group coordinator: persists what it says, answers what waits, keeps its clock.

mod log;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    time::Duration,
};

use bytes::Bytes;
use kafka_protocol::ResponseError;
use millrace_cluster::{
    group::{
        Coordinator, GroupConfig, GroupError, Output, ReplyId,
        coordinator::{Caller, Join, Joined, Synced},
    },
    metadata::Image,
};
use millrace_engine::{
    PartitionKey,
    host::Host,
    kafka_batch::NewRecord,
    sync::{Budget, WaitList},
};

use self::log::Place;
use crate::{
    config::Settings,
    kafka::hangups::Hangup,
    node::{Node, OFFSETS_TOPIC},
};

pub use self::log::Commit;

/// Commits take one of these each and hold it until the state knows of them; who takes all waits for those under way.
const APPENDS: u64 = 1 << 20;
/// Groups whose offsets expire before others have their turn.
const EXPIRED_AT_ONCE: usize = 64;
/// Pause before a partition that could not be loaded is loaded again.
const LOAD_RETRY: Duration = Duration::from_secs(1);
/// How long a request about a group waits for its partition to be loaded.
const LOAD_PATIENCE: Duration = Duration::from_secs(1);

enum Answer {
    Joined(Result<Joined, (GroupError, String)>),
    Synced(Result<Synced, GroupError>),
}

/// An answer that somebody waits for.
struct Awaited<'a> {
    driver: &'a GroupsDriver,
    reply: ReplyId,
}

impl Awaited<'_> {
    /// The answer; `None` if the peer hangs up before there is one.
    async fn answer(&self, hangup: &Hangup) -> Option<Answer> {
        let driver = self.driver;
        let answered = driver
            .answered
            .wait(|| driver.answers.borrow_mut().get_mut(&self.reply)?.take());
        let hung_up = async {
            hangup.wait().await;
            None
        };
        futures_lite::future::or(async { Some(answered.await) }, hung_up).await
    }
}

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        self.driver.answers.borrow_mut().remove(&self.reply);
    }
}

/// The group coordinator of a node.
pub struct GroupsDriver {
    state: RefCell<Coordinator>,
    /// Answers, and `None` for what is still to be answered. Whoever hangs up takes away its place, and nothing is kept for it.
    answers: RefCell<HashMap<ReplyId, Option<Answer>>>,
    answered: WaitList,
    next_reply: Cell<ReplyId>,
    clock_changed: WaitList,
    clock_generation: Cell<u64>,
    /// Outputs are carried out, and commits appended, one at a time.
    turn: Rc<Budget>,
    creating: Rc<Budget>,
    appends: Rc<Budget>,
    /// Partitions of the offsets topic whose groups are here, and the epoch of this node's leadership of each; `false` while
    /// they are being loaded.
    loaded: RefCell<HashMap<u32, (i32, bool)>>,
    loads: WaitList,
    snapshot_at: RefCell<HashMap<u32, u64>>,
}

fn config(settings: &Settings) -> GroupConfig {
    GroupConfig {
        min_session_timeout_ms: settings.number("group.min.session.timeout.ms") as i32,
        max_session_timeout_ms: settings.number("group.max.session.timeout.ms") as i32,
        initial_rebalance_delay_ms: settings.number("group.initial.rebalance.delay.ms"),
        max_size: settings.number("group.max.size") as usize,
        metadata_max_bytes: settings.number("offset.metadata.max.bytes") as usize,
        offsets_retention_ms: settings.number("offsets.retention.minutes") * 60_000,
    }
}

/// Java's `String.hashCode`, by which Kafka picks a group's partition.
fn java_hash(s: &str) -> i32 {
    s.encode_utf16()
        .fold(0_i32, |h, c| h.wrapping_mul(31).wrapping_add(i32::from(c)))
}

/// Partition of `__consumer_offsets` that holds a group.
#[must_use]
pub fn partition_of(group: &str, partitions: usize) -> u32 {
    (java_hash(group) & i32::MAX) as u32 % partitions.max(1) as u32
}

impl GroupsDriver {
    /// Without groups; [`load`](Self::load) brings them.
    #[must_use]
    pub fn new(settings: &Settings) -> Self {
        Self {
            state: RefCell::new(Coordinator::new(config(settings))),
            answers: RefCell::default(),
            answered: WaitList::default(),
            next_reply: Cell::new(0),
            clock_changed: WaitList::default(),
            clock_generation: Cell::new(0),
            turn: Budget::new(1),
            creating: Budget::new(1),
            appends: Budget::new(APPENDS),
            loaded: RefCell::default(),
            loads: WaitList::default(),
            snapshot_at: RefCell::default(),
        }
    }

    /// Takes in new metadata: groups of partitions that this node leads now are loaded, those of others forgotten, and
    /// offsets of deleted topics forgotten, too.
    pub fn metadata_changed(&self, node: &Rc<Node>, before: &Image, after: &Image) {
        if let Some(topic) = after.topic(OFFSETS_TOPIC) {
            for (index, partition) in topic.partitions.iter().enumerate() {
                let (index, epoch) = (index as u32, partition.leader_epoch);
                let leads = partition.leader == node.shared.node_id;
                let known = self.loaded.borrow().get(&index).map(|(epoch, _)| *epoch);
                if known.is_some() && (!leads || known != Some(epoch)) {
                    self.unload(node, index, topic.partitions.len());
                }
                if leads && known != Some(epoch) {
                    self.loaded.borrow_mut().insert(index, (epoch, false));
                    let key = PartitionKey {
                        topic: topic.id,
                        partition: index,
                    };
                    let (node, partitions) = (Rc::clone(node), topic.partitions.len());
                    glommio::spawn_local(async move {
                        let groups = &node.coordinator().groups;
                        while let Err(failure) = groups.load(&node, key, epoch, partitions).await {
                            if groups.loaded.borrow().get(&index) != Some(&(epoch, false)) || node.is_stopping() {
                                // Others coordinate them.
                                break;
                            }
                            tracing::warn!(
                                partition = index,
                                error = failure.message,
                                "groups could not be loaded; it is tried again"
                            );
                            node.host.sleep(LOAD_RETRY).await;
                        }
                        groups.loads.wake_all();
                    })
                    .detach();
                }
            }
        }
        let removed = before.topics().filter(|t| after.topic_by_id(&t.id).is_none());
        let removed: Vec<String> = removed.map(|t| t.name.clone()).collect();
        if !removed.is_empty() {
            // Not waited for: the groups may themselves be waiting for a change of the metadata.
            let node = Rc::clone(node);
            glommio::spawn_local(async move {
                for topic in removed {
                    node.coordinator().groups.topic_deleted(&node, &topic).await;
                }
            })
            .detach();
        }
    }

    fn unload(&self, node: &Rc<Node>, index: u32, partitions: usize) {
        self.loaded.borrow_mut().remove(&index);
        self.snapshot_at.borrow_mut().remove(&index);
        self.state
            .borrow_mut()
            .unload(|group| partition_of(group, partitions) == index);
        self.loads.wake_all();
        let node = Rc::clone(node);
        glommio::spawn_local(async move { node.coordinator().groups.after_change(&node).await }).detach();
    }

    fn wake_clock(&self) {
        self.clock_generation.set(self.clock_generation.get() + 1);
        self.clock_changed.wake_all();
    }

    /// Lets time pass for the groups; runs as long as the node. One timer for all groups.
    pub async fn run_clock(&self, node: &Rc<Node>) {
        let mut next_expiry = node.steady_ms() + 60_000;
        loop {
            let seen = self.clock_generation.get();
            let now = node.steady_ms();
            if now >= next_expiry {
                let ids = self.state.borrow().ids();
                for some in ids.chunks(EXPIRED_AT_ONCE) {
                    self.alone(node, |state| state.expire_offsets(some, now)).await;
                    node.host.yield_now().await;
                }
                next_expiry = now + 60_000;
            }
            self.state.borrow_mut().tick(now);
            self.drain(node).await;
            let due = self.state.borrow().next_deadline().unwrap_or(i64::MAX).min(next_expiry);
            let wait = Duration::from_millis((due - node.steady_ms()).clamp(1, 60_000) as u64);
            futures_lite::future::or(
                self.clock_changed
                    .wait(|| (self.clock_generation.get() != seen).then_some(())),
                node.host.sleep(wait),
            )
            .await;
            if node.is_stopping() {
                return;
            }
        }
    }

    /// Carries out what the state machine asks for, in its order.
    async fn drain(&self, node: &Rc<Node>) {
        let _turn = self.turn.acquire(1).await;
        self.carry_out(node, false).await;
    }

    /// The same for whoever has the turn; `alone` says that it has all appends, too.
    async fn carry_out(&self, node: &Rc<Node>, alone: bool) {
        loop {
            let Some(output) = self.state.borrow_mut().poll_output() else {
                break;
            };
            match output {
                Output::Persist { group, records } => {
                    // Now, not when it is its turn: what it rests on was loaded under this epoch.
                    let Ok(place) = self.place(node, &group) else {
                        continue;
                    };
                    let records = records
                        .into_iter()
                        .map(|(key, value)| NewRecord {
                            key: Some(key),
                            value,
                            timestamp: node.steady_ms(),
                        })
                        .collect::<Vec<_>>();
                    if let Err(failure) = self.persist(node, place, &records, alone).await {
                        if matches!(
                            failure.error,
                            ResponseError::NotCoordinator | ResponseError::NotLeaderOrFollower
                        ) {
                            // Another coordinator has the group, and its own idea of it.
                            continue;
                        }
                        // The group goes on; after a restart its members would join again.
                        tracing::error!(group, error = failure.message, "a group's state could not be persisted");
                    }
                }
                Output::Joined(reply, answer) => self.answer(reply, Answer::Joined(answer)),
                Output::Synced(reply, answer) => self.answer(reply, Answer::Synced(answer)),
            }
        }
        self.answered.wake_all();
    }

    /// Changes the state while no commit is under way, and has the log say so before the next.
    async fn alone<T>(&self, node: &Rc<Node>, act: impl FnOnce(&mut Coordinator) -> T) -> T {
        let _turn = self.turn.acquire(1).await;
        let _all = self.appends.acquire(APPENDS).await;
        let result = act(&mut self.state.borrow_mut());
        self.carry_out(node, true).await;
        result
    }

    async fn after_change(&self, node: &Rc<Node>) {
        self.drain(node).await;
        self.wake_clock();
    }

    fn awaited(&self) -> Awaited<'_> {
        let reply = self.next_reply.get();
        self.next_reply.set(reply + 1);
        self.answers.borrow_mut().insert(reply, None);
        Awaited { driver: self, reply }
    }

    fn answer(&self, reply: ReplyId, answer: Answer) {
        if let Some(place) = self.answers.borrow_mut().get_mut(&reply) {
            *place = Some(answer);
        }
    }

    /// Whether this node coordinates a group, and has it loaded; waits a while for that. With `create` the topic is created if
    /// it is not there; without it there are no groups at all then, and nothing to wait for.
    async fn ready(&self, node: &Rc<Node>, group: &str, create: bool) -> Result<(), GroupError> {
        if node.view().image.topic(OFFSETS_TOPIC).is_none() {
            if !create {
                return Ok(());
            }
            if let Err(failure) = self.create_topic(node).await {
                tracing::warn!(error = failure.message, "{OFFSETS_TOPIC} could not be created");
                return Err(GroupError::Loading);
            }
        }
        let loading = self.loads.wait(|| match self.is_loaded(node, group) {
            Err(GroupError::Loading) => None,
            other => Some(other),
        });
        let patience = async {
            node.host.sleep(LOAD_PATIENCE).await;
            Err(GroupError::Loading)
        };
        futures_lite::future::or(loading, patience).await
    }

    /// Whether this node coordinates a group, and has it loaded.
    ///
    /// # Errors
    /// [`GroupError::NotCoordinator`], [`GroupError::Loading`].
    pub fn is_loaded(&self, node: &Rc<Node>, group: &str) -> Result<(), GroupError> {
        let view = node.view();
        let topic = view.image.topic(OFFSETS_TOPIC).ok_or(GroupError::NotCoordinator)?;
        let index = partition_of(group, topic.partitions.len());
        match self.loaded.borrow().get(&index) {
            Some((_, true)) => Ok(()),
            Some((_, false)) => Err(GroupError::Loading),
            None if topic.partitions[index as usize].leader == node.shared.node_id => Err(GroupError::Loading),
            None => Err(GroupError::NotCoordinator),
        }
    }

    /// JoinGroup.
    ///
    /// # Errors
    /// The error and the member id to answer with. A peer that hangs up while others are waited for is a member all the same, as in
    /// Kafka: it goes when its session expires.
    pub async fn join(&self, node: &Rc<Node>, join: Join, hangup: &Hangup) -> Result<Joined, (GroupError, String)> {
        let ready = self.ready(node, &join.group, !join.group.is_empty()).await;
        ready.map_err(|e| (e, join.member_id.clone()))?;
        let awaited = self.awaited();
        let member_id = join.member_id.clone();
        self.state.borrow_mut().join(awaited.reply, join, node.steady_ms());
        self.after_change(node).await;
        match awaited.answer(hangup).await {
            Some(Answer::Joined(answer)) => answer,
            Some(Answer::Synced(_)) => unreachable!("reply ids are given once"),
            None => Err((GroupError::RebalanceInProgress, member_id)),
        }
    }

    /// SyncGroup.
    ///
    /// # Errors
    /// [`GroupError`].
    pub async fn sync(
        &self,
        node: &Rc<Node>,
        group: &str,
        caller: Caller<'_>,
        protocol: (Option<&str>, Option<&str>),
        assignments: Vec<(String, Bytes)>,
        hangup: &Hangup,
    ) -> Result<Synced, GroupError> {
        self.ready(node, group, false).await?;
        let awaited = self.awaited();
        let now = node.steady_ms();
        (self.state.borrow_mut()).sync(awaited.reply, group, caller, protocol, assignments, now);
        self.after_change(node).await;
        match awaited.answer(hangup).await {
            Some(Answer::Synced(answer)) => answer,
            Some(Answer::Joined(_)) => unreachable!("reply ids are given once"),
            None => Err(GroupError::RebalanceInProgress),
        }
    }

    /// All groups that are loaded here.
    pub fn look<T>(&self, look: impl FnOnce(&Coordinator) -> T) -> T {
        look(&self.state.borrow())
    }

    /// Anything about a group that is answered at once.
    ///
    /// # Errors
    /// The group's, and [`GroupError::NotCoordinator`], [`GroupError::Loading`].
    pub async fn with<T>(
        &self,
        node: &Rc<Node>,
        group: &str,
        act: impl FnOnce(&mut Coordinator, i64) -> Result<T, GroupError>,
    ) -> Result<T, GroupError> {
        self.ready(node, group, false).await?;
        let result = act(&mut self.state.borrow_mut(), node.steady_ms());
        self.after_change(node).await;
        result
    }

    /// The same for what removes offsets: a commit under way is removed, too, and one that comes later is not.
    ///
    /// # Errors
    /// The group's, and [`GroupError::NotCoordinator`], [`GroupError::Loading`].
    pub async fn remove<T>(
        &self,
        node: &Rc<Node>,
        group: &str,
        act: impl FnOnce(&mut Coordinator) -> Result<T, GroupError>,
    ) -> Result<T, GroupError> {
        self.ready(node, group, false).await?;
        let act_if_still_here = |state: &mut Coordinator| {
            if node.view().image.topic(OFFSETS_TOPIC).is_some() {
                self.is_loaded(node, group)?;
            }
            act(state)
        };
        let result = self.alone(node, act_if_still_here).await;
        self.wake_clock();
        result
    }

    /// A topic is gone, and with it what was committed for it.
    pub async fn topic_deleted(&self, node: &Rc<Node>, topic: &str) {
        self.alone(node, |state| state.topic_deleted(topic)).await;
    }

    /// Where a group that is loaded here stands.
    fn place(&self, node: &Node, group: &str) -> Result<Place, GroupError> {
        let view = node.view();
        let topic = view.image.topic(OFFSETS_TOPIC).ok_or(GroupError::NotCoordinator)?;
        let partition = partition_of(group, topic.partitions.len());
        match self.loaded.borrow().get(&partition) {
            Some((epoch, true)) => {
                let topic = topic.id;
                Ok((PartitionKey { topic, partition }, *epoch))
            }
            _ => Err(GroupError::NotCoordinator),
        }
    }
}
