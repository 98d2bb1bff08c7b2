//! A leader's stream to one shard of another node: what is due to be sent of which partition, and the answers.

use std::{
    cell::{Cell, RefCell},
    collections::{HashSet, VecDeque},
    rc::Rc,
    time::Duration,
};

use bytes::Bytes;
use millrace_cluster::{
    metadata::record,
    peer::{LOG_START_VERSION, StreamKind},
    replica::{
        Answer, Next, Request,
        message::{self, Order, Says},
    },
};
use millrace_engine::{PartitionKey, ReadError, host::Host, sync::WaitList};
use millrace_net::quic::{FrameReceiver, FrameSender, LinkError};

use super::{Role, Slot, leading, throttle};
use crate::{node::Node, peers::dial};

/// Bytes of batches in one frame.
const FRAME_BYTES: usize = 512 << 10;
/// Bytes gathered before they are sent.
const SEND_BYTES: usize = 1 << 20;
/// Pause after the first failure to connect; doubled by each further one.
const RETRY_MIN: Duration = Duration::from_millis(20);
/// Longest pause.
const RETRY_MAX: Duration = Duration::from_millis(500);
/// Pause before a follower that knows nothing of the leadership yet is asked again.
const NOT_YET: Duration = Duration::from_millis(20);
/// How long a connection for followers that catch up is kept without any.
const IDLE: Duration = Duration::from_secs(5);
/// Pause before a follower whose log has failed is asked again.
const FAILED: Duration = Duration::from_secs(1);

/// What a link carries. Followers that catch up have links of their own, in the background: reading what they lack from the disk
/// holds up nobody who is in sync.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Lane {
    /// To replicas in sync.
    Live,
    /// To others.
    CatchUp,
}

/// Why a connection has ended.
enum Ended {
    /// Nothing was left to carry.
    Idle,
    /// Otherwise.
    Failed(LinkError),
}

/// Node, shard, what for.
pub(super) type Destination = (i32, u32, Lane);

/// The way from this shard to one shard of another node.
pub(super) struct Link {
    to: Destination,
    due: RefCell<VecDeque<PartitionKey>>,
    is_due: RefCell<HashSet<PartitionKey>>,
    wake: WaitList,
    restarts: Cell<u64>,
    /// Version that the stream speaks.
    version: Cell<u16>,
}

fn destination(slot: &Slot, follower: i32) -> Destination {
    let shard = slot.shards.borrow().get(&follower).copied().unwrap_or(0);
    let lane = if slot.is_in_isr(follower) {
        Lane::Live
    } else {
        Lane::CatchUp
    };
    (follower, shard, lane)
}

/// The link that carries a partition to a follower, made if it is not there.
pub(super) fn to(node: &Rc<Node>, slot: &Slot, follower: i32) -> Rc<Link> {
    let to = destination(slot, follower);
    if let Some(link) = node.replication.links.borrow().get(&to) {
        return Rc::clone(link);
    }
    let link = Rc::new(Link {
        to,
        due: RefCell::default(),
        is_due: RefCell::default(),
        wake: WaitList::default(),
        restarts: Cell::new(0),
        version: Cell::new(0),
    });
    node.replication.links.borrow_mut().insert(to, Rc::clone(&link));
    let (n, running) = (Rc::clone(node), Rc::clone(&link));
    let run = async move { running.run(&n).await };
    match to.2 {
        Lane::Live => {
            glommio::spawn_local(run).detach();
        }
        Lane::CatchUp => node.host.spawn(run),
    }
    link
}

impl Link {
    /// Something may be due to be sent of a partition.
    pub fn push(&self, key: PartitionKey) {
        if self.is_due.borrow_mut().insert(key) {
            self.due.borrow_mut().push_back(key);
            self.wake.wake_all();
        }
    }

    pub(super) fn restart(&self) {
        self.restarts.set(self.restarts.get() + 1);
        self.wake.wake_all();
    }

    fn push_later(self: &Rc<Self>, node: &Rc<Node>, key: PartitionKey, pause: Duration) {
        let (node, link) = (Rc::clone(node), Rc::clone(self));
        glommio::spawn_local(async move {
            node.host_sleep(pause).await;
            link.push(key);
        })
        .detach();
    }

    /// Partitions that this link carries, or carried a moment ago: they change lanes while something is on its way.
    fn carried(&self, node: &Rc<Node>) -> Vec<Rc<Slot>> {
        let (follower, shard, _) = self.to;
        let mine = |slot: &Rc<Slot>| {
            slot.shards.borrow().get(&follower).copied().unwrap_or(0) == shard
                && matches!(&*slot.role.borrow(), Role::Leads(leader) if leader.followers().any(|f| f == follower))
        };
        node.replication.all().into_iter().filter(mine).collect()
    }

    async fn run(self: &Rc<Self>, node: &Rc<Node>) {
        let (follower, shard, _) = self.to;
        let mut pause = RETRY_MIN;
        let mut told = String::new();
        while !node.is_stopping() {
            self.wake.wait(|| (!self.due.borrow().is_empty()).then_some(())).await;
            let ended = match dial::open(node, follower, shard, StreamKind::Replica).await {
                Ok(stream) => {
                    tracing::debug!(follower, shard, "connected to a follower");
                    pause = RETRY_MIN;
                    told.clear();
                    self.version.set(stream.version);
                    let receiving = self.receive(node, stream.rx);
                    let ended = futures_lite::future::or(self.send(node, stream.tx), receiving).await;
                    stream.connection.close("the link has ended");
                    for slot in self.carried(node) {
                        if let Role::Leads(leader) = &mut *slot.role.borrow_mut() {
                            leader.lost(follower);
                        }
                    }
                    ended
                }
                Err(error) => Ended::Failed(error),
            };
            if let Ended::Failed(error) = ended {
                let error = error.to_string();
                if told != error && !node.is_stopping() {
                    tracing::warn!(follower, shard, error, "a follower cannot be reached");
                    told = error;
                }
                node.host_sleep(pause).await;
                pause = (pause * 2).min(RETRY_MAX);
            }
            for slot in self.carried(node) {
                to(node, &slot, follower).push(slot.key);
            }
        }
    }

    async fn send(self: &Rc<Self>, node: &Rc<Node>, mut tx: FrameSender) -> Ended {
        let restarts = self.restarts.get();
        loop {
            let restarted = || self.restarts.get() != restarts;
            let due = || !self.due.borrow().is_empty();
            let woken = self.wake.wait(|| (due() || restarted()).then_some(true));
            let idle = async {
                if self.to.2 == Lane::Live {
                    std::future::pending::<()>().await;
                }
                node.host_sleep(IDLE).await;
                false
            };
            if !futures_lite::future::or(woken, idle).await {
                return Ended::Idle;
            }
            if restarted() {
                return Ended::Failed(LinkError::Lost("its process has died".into()));
            }
            let mut frames = Vec::new();
            let mut bytes = 0;
            while bytes < SEND_BYTES {
                let Some(key) = self.due.borrow_mut().pop_front() else {
                    break;
                };
                self.is_due.borrow_mut().remove(&key);
                if let Some(frame) = self.frame(node, key).await {
                    bytes += frame.iter().map(Bytes::len).sum::<usize>();
                    frames.push(frame);
                    // There may be more of it; the others come first.
                    self.push(key);
                }
            }
            if frames.is_empty() {
                continue;
            }
            if let Err(error) = tx.send(frames).await {
                return Ended::Failed(error);
            }
        }
    }

    /// What is due of a partition now, if anything.
    async fn frame(self: &Rc<Self>, node: &Rc<Node>, key: PartitionKey) -> Option<Vec<Bytes>> {
        let (follower, _, lane) = self.to;
        let slot = node.replication.slot(&key)?;
        if destination(&slot, follower) != self.to {
            to(node, &slot, follower).push(key);
            return None;
        }
        let rate = match lane {
            Lane::Live => None,
            Lane::CatchUp => throttle::rate(node),
        };
        if rate.is_some()
            && let Some(wait) = node.replication.throttle.wait()
        {
            self.push_later(node, key, wait);
            return None;
        }
        let status = slot.partition.status();
        let (next, epoch, high_watermark) = match &mut *slot.role.borrow_mut() {
            Role::Leads(leader) => {
                leader.connected(follower, self.version.get() >= LOG_START_VERSION);
                (leader.next(follower)?, leader.epoch(), leader.high_watermark())
            }
            _ => return None,
        };
        let request = |round, order| Request {
            key: key.into(),
            epoch,
            round,
            high_watermark,
            log_start: status.log_start,
            order,
        };
        let (round, from) = match next {
            Next::Order { round, order } => return Some(message::encode_request(&request(round, order), &[])),
            Next::Batches { round, from } => (round, from),
        };
        let batches = match node.engine.batches_from(key, from, FRAME_BYTES).await {
            Ok(batches) => batches,
            Err(error) => {
                if let Role::Leads(leader) = &mut *slot.role.borrow_mut() {
                    leader.lost(follower);
                }
                // What the follower wants was removed: it will be told to begin where the log begins now.
                if let ReadError::OffsetOutOfRange { .. } = error {
                    self.push_later(node, key, NOT_YET);
                    return None;
                }
                tracing::error!(partition = %key, %error, "a follower cannot be sent what it lacks");
                self.push_later(node, key, FAILED);
                return None;
            }
        };
        let (Some(first), Some(last)) = (batches.first(), batches.last()) else {
            return None;
        };
        // A leadership may have ended while this was read, and the log been cut.
        let same = first.header.base_offset <= from && slot.check_leads(epoch).is_ok();
        if !same {
            return None;
        }
        let bytes = batches.iter().map(|b| b.payload.len()).sum();
        if let Some(rate) = rate {
            node.replication.throttle.sent(bytes, rate);
        }
        if let Role::Leads(leader) = &mut *slot.role.borrow_mut() {
            leader.sent(follower, round, last.header.last_offset + 1, bytes);
        }
        Some(message::encode_request(&request(round, Order::Append), &batches))
    }

    async fn receive(self: &Rc<Self>, node: &Rc<Node>, mut rx: FrameReceiver) -> Ended {
        let lost = |reason: &str| Ended::Failed(LinkError::Lost(reason.into()));
        let follower = self.to.0;
        loop {
            let frame = match rx.next().await {
                Ok(Some(frame)) => frame,
                Ok(None) => return lost("the follower has closed it"),
                Err(error) => return Ended::Failed(error),
            };
            let Ok(answer) = record::decode::<Answer>(&frame) else {
                return Ended::Failed(LinkError::Garbage("an answer that is none".into()));
            };
            let key = PartitionKey::from(answer.key);
            let Some(slot) = node.replication.slot(&key) else {
                continue;
            };
            if slot.check_leads(answer.epoch).is_err() {
                continue;
            }
            if let Says::Elsewhere { shard } = answer.says {
                slot.shards.borrow_mut().insert(follower, shard);
            }
            leading::answered(node, &slot, follower, answer.round, answer.says);
            match answer.says {
                Says::Stands(_) | Says::Durable(_) | Says::LogStart(_) | Says::Elsewhere { .. } => {
                    to(node, &slot, follower).push(key)
                }
                Says::NotYet => self.push_later(node, key, NOT_YET),
                // The metadata will say who leads.
                Says::Stale => self.push_later(node, key, FAILED),
                Says::Failed => self.push_later(node, key, FAILED),
            }
        }
    }
}
