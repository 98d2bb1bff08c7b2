//! Replication on one shard: the role of each of its partitions, [`leading`] sends to followers, [`following`] takes what
//! leaders send, [`link`] is the way there, [`agreed`] keeps high watermarks over a restart. The decisions are in
//! `millrace_cluster::replica`; here they are carried out.

pub mod agreed;
pub mod following;
pub mod leading;
mod link;
mod throttle;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use kafka_protocol::ResponseError;
use millrace_cluster::{
    controller::leadership,
    metadata::PartitionImage,
    replica::{Handover, Leader, follower::Stood, handover},
};
use millrace_engine::{
    PartitionKey, PartitionMap,
    kafka_batch::BatchInfo,
    log::ProducerStates,
    shard::Partition,
    sync::{Budget, Permit, WaitList},
};

use self::{
    agreed::Notes,
    link::{Destination, Link},
    throttle::Throttle,
};
use crate::{kafka::errors::Failure, node::Node};

/// How long the replicas have to agree on what a partition that goes to another core has taken in.
const AGREED: Duration = Duration::from_secs(1);

/// What a partition's copy here is.
#[derive(Debug)]
pub enum Role {
    /// Nothing yet: it is about to lead, or nobody does.
    None,
    /// The only copy: it leads, and nobody follows.
    Alone,
    /// Leads others.
    Leads(Box<Leader>),
    /// Follows this node.
    Follows(i32),
}

/// A partition of this shard, and its role.
pub struct Slot {
    /// Which.
    pub key: PartitionKey,
    /// Its log.
    pub partition: Rc<Partition>,
    /// Epoch of the leadership that the metadata says.
    epoch: Cell<i32>,
    /// What it is under that epoch.
    role: RefCell<Role>,
    /// Until when gaps of idempotent producers may close by themselves.
    handover: Cell<Handover>,
    /// Whoever changes a follower's log, or makes it a leader's, holds this.
    turn: Rc<Budget>,
    /// The turn, while the partition goes to another core.
    leaving: RefCell<Option<Permit>>,
    /// What it last said of its log as a follower.
    stood: Cell<Stood>,
    /// As a follower it could not do what its leader asked last.
    failed: Cell<bool>,
    /// On which of their shards followers have it, as far as they said.
    shards: RefCell<HashMap<i32, u32>>,
}

/// All partitions of a shard, and its links to other nodes' shards.
#[derive(Default)]
pub struct Replication {
    slots: RefCell<PartitionMap<Rc<Slot>>>,
    links: RefCell<HashMap<Destination, Rc<Link>>>,
    throttle: Throttle,
    notes: Notes,
    /// Copies that were begun anew, and when.
    begun_anew: RefCell<PartitionMap<Instant>>,
    /// Some ISR may have to change.
    isr_news: WaitList,
    isr_wanted: Cell<bool>,
}

impl Slot {
    /// Fails unless this copy leads under `epoch`.
    ///
    /// # Errors
    /// NOT_LEADER_OR_FOLLOWER.
    pub fn check_leads(&self, epoch: i32) -> Result<(), Failure> {
        match &*self.role.borrow() {
            Role::Alone | Role::Leads(_) if self.epoch.get() == epoch => Ok(()),
            _ => Err(Failure::not_leader()),
        }
    }

    /// Fails if batches that idempotent producers sent before these may still have to come again: they were in flight to the leader
    /// before, or refused here a moment ago.
    ///
    /// # Errors
    /// NOT_LEADER_OR_FOLLOWER.
    pub fn check_sequel(&self, now: i64, batches: &[(BatchInfo, Bytes)]) -> Result<(), Failure> {
        let handover = self.handover.get();
        if handover.is_over(now) {
            return Ok(());
        }
        let keeps_out = |producers: &ProducerStates| {
            let mut infos = batches.iter().map(|(info, _)| info);
            infos.any(|info| handover.keeps_out(producers, info, now))
        };
        if self.partition.with_state(|s| keeps_out(&s.producers)) {
            return Err(Failure::new(
                ResponseError::NotLeaderOrFollower,
                "batches that the producer sent before are not here yet: send them again, in order",
            ));
        }
        Ok(())
    }

    fn begins_to_lead(&self, now: i64) {
        self.handover.set(Handover::of_leadership(self.epoch.get(), now));
    }

    /// Fails if too few replicas are in sync for a batch that all of them are to have.
    ///
    /// # Errors
    /// NOT_ENOUGH_REPLICAS.
    pub fn check_in_sync(&self, now: i64, min_insync: usize) -> Result<(), Failure> {
        let in_sync = self.in_sync().unwrap_or(1);
        if in_sync >= min_insync {
            return Ok(());
        }
        self.handover.set(Handover::at(now, handover::SPAN_MS));
        Err(Failure::new(
            ResponseError::NotEnoughReplicas,
            too_few(in_sync, min_insync),
        ))
    }

    /// Fails unless this copy may be read under `epoch`: as the leader's, or, if followers are allowed, as one that follows it.
    ///
    /// # Errors
    /// NOT_LEADER_OR_FOLLOWER.
    pub fn check_readable(&self, epoch: i32, followers: bool) -> Result<(), Failure> {
        let follows = matches!(&*self.role.borrow(), Role::Follows(leader) if *leader >= 0);
        if followers && follows && self.epoch.get() == epoch {
            return Ok(());
        }
        self.check_leads(epoch)
    }

    /// A replica in sync that stands in a rack where this one does not (KIP-392), for a consumer there.
    #[must_use]
    pub fn closer(&self, node: &Node, rack: &str) -> Option<i32> {
        let view = node.view();
        let stands_there = |id: i32| {
            let broker = view.image.broker(id).filter(|b| !b.fenced);
            broker.is_some_and(|b| b.registration.rack.as_deref() == Some(rack))
        };
        match &*self.role.borrow() {
            Role::Leads(leader) if !stands_there(node.shared.node_id) => {
                leader.isr().iter().copied().find(|id| stands_there(*id))
            }
            _ => None,
        }
    }

    /// Fails unless the end of the log is known: a new leader first has to hear of its followers.
    ///
    /// # Errors
    /// OFFSET_NOT_AVAILABLE.
    pub fn check_end_known(&self) -> Result<(), Failure> {
        match &*self.role.borrow() {
            Role::Leads(leader) if !leader.knows_the_end() => Err(Failure::new(
                ResponseError::OffsetNotAvailable,
                "the new leader does not know yet what its followers hold",
            )),
            _ => Ok(()),
        }
    }

    /// Waits until the end of the log is known under a leadership of this copy.
    ///
    /// # Errors
    /// The leadership is over.
    pub async fn wait_end_known(&self, epoch: i32) -> Result<(), Failure> {
        self.partition
            .changes()
            .wait(|| {
                if self.epoch.get() > epoch || self.partition.is_deleted() {
                    return Some(Err(Failure::not_leader()));
                }
                let known = self.check_leads(epoch).and_then(|()| self.check_end_known());
                known.ok().map(Ok)
            })
            .await
    }

    /// Replicas in sync, if others follow.
    #[must_use]
    pub fn in_sync(&self) -> Option<usize> {
        match &*self.role.borrow() {
            Role::Leads(leader) => Some(leader.isr().len()),
            _ => None,
        }
    }

    /// Waits until everything below `end` is held as `acks` asks: durably here, or by every replica in sync.
    ///
    /// # Errors
    /// Leadership or disk were lost, or fewer replicas are in sync than `min_insync` says.
    pub async fn wait_acknowledged(
        &self,
        epoch: i32,
        end: i64,
        by_all: bool,
        min_insync: usize,
    ) -> Result<(), Failure> {
        if !by_all {
            return Ok(self.partition.wait_durable(end).await?);
        }
        self.partition
            .changes()
            .wait(|| {
                if let Err(failure) = self.check_leads(epoch) {
                    return Some(Err(failure));
                }
                if self.partition.status().high_watermark >= end {
                    return Some(Ok(()));
                }
                // The high watermark stands still then.
                if let Some(failure) = self.too_few_in_sync(min_insync) {
                    return Some(Err(failure));
                }
                let healthy = self.partition.check_healthy().map_err(Failure::from);
                match healthy {
                    Ok(()) if self.partition.is_deleted() => Some(Err(Failure::unknown_partition())),
                    Ok(()) => None,
                    Err(failure) => Some(Err(failure)),
                }
            })
            .await?;
        self.too_few_in_sync(min_insync).map_or(Ok(()), Err)
    }

    /// Waits until what stands before `to` is deleted durably on every replica in sync, of which there must be as many as for an
    /// acknowledgement: it would come back with the next leader.
    ///
    /// # Errors
    /// The leadership is over.
    pub async fn wait_deleted(&self, epoch: i32, to: i64) -> Result<(), Failure> {
        self.partition
            .changes()
            .wait(|| {
                if let Err(failure) = self.check_leads(epoch) {
                    return Some(Err(failure));
                }
                match &*self.role.borrow() {
                    Role::Leads(leader) if leader.low_watermark() < to => None,
                    _ => Some(Ok(())),
                }
            })
            .await
    }

    fn too_few_in_sync(&self, min_insync: usize) -> Option<Failure> {
        let in_sync = self.in_sync().filter(|n| *n < min_insync)?;
        Some(Failure::new(
            ResponseError::NotEnoughReplicasAfterAppend,
            too_few(in_sync, min_insync),
        ))
    }
}

fn too_few(in_sync: usize, min_insync: usize) -> String {
    format!("{in_sync} replicas are in sync, min.insync.replicas is {min_insync}")
}

impl Replication {
    /// A partition of this shard.
    #[must_use]
    pub fn slot(&self, key: &PartitionKey) -> Option<Rc<Slot>> {
        self.slots.borrow().get(key).cloned()
    }

    fn all(&self) -> Vec<Rc<Slot>> {
        self.slots.borrow().values().cloned().collect()
    }

    /// A partition is not here any more.
    pub fn removed(&self, key: &PartitionKey) {
        if let Some(slot) = self.slots.borrow_mut().remove(key) {
            slot.role.replace(Role::None);
            slot.leaving.take();
            slot.partition.changes().wake_all();
        }
    }

    /// Another node's process seems to have died: what is connected to it is given up, and connected anew.
    pub fn reconnect(&self, node: i32) {
        for ((to, _, _), link) in self.links.borrow().iter() {
            if *to == node {
                link.restart();
            }
        }
    }

    fn want_isr(&self) {
        self.isr_wanted.set(true);
        self.isr_news.wake_all();
    }
}

/// Takes in what the metadata says of a partition of this shard.
pub fn assign(node: &Rc<Node>, partition: &Rc<Partition>, image: &PartitionImage) {
    let replication = &node.replication;
    let slot = Rc::clone(replication.slots.borrow_mut().entry(partition.key).or_insert_with(|| {
        Rc::new(Slot {
            key: partition.key,
            partition: Rc::clone(partition),
            epoch: Cell::new(-1),
            role: RefCell::new(Role::None),
            handover: Cell::new(Handover::NONE),
            turn: Budget::new(1),
            leaving: RefCell::default(),
            stood: Cell::default(),
            failed: Cell::new(false),
            shards: RefCell::default(),
        })
    }));
    let me = node.shared.node_id;
    let same = slot.epoch.replace(image.leader_epoch) == image.leader_epoch;
    if image.leader == me && image.replicas.len() == 1 {
        node.engine.set_replicated(partition, false);
        if !matches!(slot.role.replace(Role::Alone), Role::Alone) || !same {
            slot.begins_to_lead(now_ms(node));
        }
    } else if image.leader == me {
        node.engine.set_replicated(partition, true);
        let mut role = slot.role.borrow_mut();
        if let (Role::Leads(leader), true) = (&mut *role, same) {
            leader.committed(image, min_insync(node, &slot, image), now_ms(node));
            let high_watermark = leader.high_watermark();
            drop(role);
            node.engine.advance_high_watermark(partition, high_watermark);
            leading::nudge(node, &slot);
            return;
        }
        *role = Role::None;
        drop(role);
        let (node, image) = (Rc::clone(node), image.clone());
        glommio::spawn_local(async move { leading::lead(&node, slot, image).await }).detach();
    } else {
        node.engine.set_replicated(partition, true);
        if !matches!(&*slot.role.borrow(), Role::Follows(leader) if same && *leader == image.leader) {
            slot.role.replace(Role::Follows(image.leader));
        }
    }
    // Whoever waits for an acknowledgement by a leader that is none any more.
    partition.changes().wake_all();
}

/// Holds a partition of this shard, which is about to go to another core: nothing changes its log from here on. Waits a moment
/// for the replicas to agree on what was taken in before, so that its producers are answered. Returns whether it leads others.
///
/// # Errors
/// It is not here, or its log has failed.
pub async fn hold(node: &Rc<Node>, key: &PartitionKey) -> Result<bool, Failure> {
    let slot = node.replication.slot(key).ok_or_else(Failure::not_leader)?;
    let turn = slot.turn.acquire(1).await;
    if slot.partition.is_deleted() {
        return Err(Failure::not_leader());
    }
    node.engine.wait_cleared(key).await?;
    node.engine.hold(&slot.partition)?;
    slot.leaving.replace(Some(turn));
    let leads = || matches!(&*slot.role.borrow(), Role::Leads(_));
    let agreed = slot.partition.changes().wait(|| {
        let status = slot.partition.status();
        let agreed = status.high_watermark >= status.log_end || !leads() || slot.partition.check_healthy().is_err();
        agreed.then_some(())
    });
    futures_lite::future::or(agreed, node.host_sleep(AGREED)).await;
    Ok(leads())
}

/// A partition that was held stays here; if its move has failed half-way, as a log that has failed.
pub fn resume(node: &Rc<Node>, key: &PartitionKey) {
    if let Some(slot) = node.replication.slot(key) {
        node.engine.resume(&slot.partition);
        slot.leaving.take();
    }
}

/// How many replicas must be in sync for the high watermark to move.
fn min_insync(node: &Node, slot: &Slot, image: &PartitionImage) -> usize {
    let view = node.view();
    let topic = view.image.topic_by_id(&slot.key.topic);
    topic.map_or(usize::MAX, |topic| leadership::min_insync(&view.image, topic, image))
}

/// Milliseconds of a clock that does not jump.
pub(crate) fn now_ms(node: &Node) -> i64 {
    node.started.elapsed().as_millis() as i64
}

/// Waits until `due`, and for `pause` at most.
pub(crate) async fn after(node: &Rc<Node>, pause: Duration, wake: &WaitList, due: impl Fn() -> bool) {
    let until = Instant::now() + pause;
    futures_lite::future::or(
        wake.wait(|| due().then_some(())),
        node.host_sleep(until.saturating_duration_since(Instant::now())),
    )
    .await;
}
