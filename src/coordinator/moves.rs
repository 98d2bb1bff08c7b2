//! Partitions go from one core of this node to another while they are served. What the shards do is in the engine
//! (`millrace_engine::shard`, "A partition goes to another shard"); this leads them through it, one partition at a time, and answers
//! nothing to clients: those that ask while a partition is on its way are told that it is not led here, and ask again.

use std::{cell::RefCell, collections::BTreeMap, rc::Rc, time::Duration};

use kafka_protocol::ResponseError;
use millrace_engine::{PartitionKey, StorageError, log::LogState, sync::WaitList};

use super::{brokers, controller::ControllerDriver};
use crate::{
    kafka::errors::Failure,
    node::{Node, OFFSETS_TOPIC},
    replication,
    router::Stopping,
};

/// Pause after a move that failed for a reason that may pass.
const RETRY: Duration = Duration::from_secs(1);

/// Moves that were asked for.
#[derive(Default)]
pub struct Moves {
    wanted: RefCell<BTreeMap<PartitionKey, usize>>,
    wake: WaitList,
}

impl Moves {
    /// Asks for a move. Asking for the core where the partition is takes one back that has not begun.
    pub fn want(&self, key: PartitionKey, to: usize) {
        self.wanted.borrow_mut().insert(key, to);
        self.wake.wake_all();
    }

    /// Where a partition is to go, if it is to go.
    #[must_use]
    pub fn target(&self, key: &PartitionKey) -> Option<usize> {
        self.wanted.borrow().get(key).copied()
    }

    /// Whether nothing is left to be moved.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.wanted.borrow().is_empty()
    }

    /// Makes the moves that are asked for, as long as the node runs.
    pub async fn run(&self, node: &Rc<Node>) {
        loop {
            let next = || self.wanted.borrow().first_key_value().map(|(k, to)| (*k, *to));
            let stop = async {
                node.stop.wait(|| node.is_stop_wanted().then_some(())).await;
                None
            };
            let next = futures_lite::future::or(stop, async { Some(self.wake.wait(next).await) }).await;
            let Some((key, to)) = next else { return };
            match carry(node, key, to).await {
                Ok(()) => {}
                Err(failure) if is_passing(&failure) && node.view().placement.contains_key(&key) => {
                    tracing::warn!(partition = %key, to, error = failure.message, "a partition could not be moved to another core; it is tried again");
                    node.host_sleep(RETRY).await;
                    continue;
                }
                Err(failure) => {
                    tracing::error!(partition = %key, to, error = failure.message, "a partition is not moved to another core");
                }
            }
            let mut wanted = self.wanted.borrow_mut();
            // Another target may have been named meanwhile.
            if wanted.get(&key) == Some(&to) {
                wanted.remove(&key);
            }
        }
    }
}

fn is_passing(failure: &Failure) -> bool {
    matches!(
        failure.error,
        ResponseError::NotController | ResponseError::NotLeaderOrFollower
    )
}

/// Why a partition cannot be on that core, if so.
///
/// # Errors
/// [`Failure`].
pub fn check(node: &Node, key: &PartitionKey, to: usize) -> Result<(), Failure> {
    let view = node.view();
    let topic = view
        .image
        .topic_by_id(&key.topic)
        .ok_or_else(Failure::unknown_partition)?;
    if topic.partitions.len() <= key.partition as usize {
        return Err(Failure::unknown_partition());
    }
    if !view.placement.contains_key(key) {
        return Err(Failure::new(
            ResponseError::ReplicaNotAvailable,
            "this broker holds no replica of the partition",
        ));
    }
    if to >= node.router.shards() {
        return Err(Failure::new(
            ResponseError::LogDirNotFound,
            format!("this broker has {} cores", node.router.shards()),
        ));
    }
    if topic.name == OFFSETS_TOPIC && to != 0 {
        return Err(Failure::new(
            ResponseError::PolicyViolation,
            "the group coordinator's topic stays on its core, the first",
        ));
    }
    Ok(())
}

/// Moves one partition.
async fn carry(node: &Rc<Node>, key: PartitionKey, to: usize) -> Result<(), Failure> {
    check(node, &key, to)?;
    let from = |node: &Node| Some(*node.view().placement.get(&key)? as usize);
    let Some(source) = from(node).filter(|s| *s != to) else {
        return Ok(());
    };
    let begun = std::time::Instant::now();
    // Most of what is in memory goes to segments while appends go on: little is left to be written while they wait.
    on(node, source, |n| async move { n.engine.flush_all().await }).await??;
    let held = std::time::Instant::now();
    let leads = on(node, source, move |n| async move { replication::hold(&n, &key).await }).await??;
    let settled = async {
        if leads {
            // From here on nobody takes what the old core has sent to followers, wherever it still is.
            brokers::lead_anew(node, key.topic, key.partition).await?;
        }
        let placing = node.coordinator().controller.placing().await;
        if from(node) != Some(source) {
            return Err(Failure::not_leader());
        }
        let state = on(node, source, move |n| async move { settle(&n, &key).await }).await??;
        Ok((placing, state))
    };
    let (placing, state) = match settled.await {
        Ok(settled) => settled,
        Err(failure) => {
            on(node, source, move |n| async move { replication::resume(&n, &key) }).await?;
            return Err(failure);
        }
    };
    let log_end = state.log_end();
    let moved = hand_over(node, state, source, to).await?;
    if moved.is_ok() {
        let controller: &ControllerDriver = &node.coordinator().controller;
        controller.moved(node, key, to as u32).await;
        on(node, to, move |n| async move { n.arrived(&key) }).await?;
    }
    drop(placing);
    tracing::info!(
        partition = %key,
        from = source,
        to,
        log_end,
        held_ms = held.elapsed().as_millis() as u64,
        took_ms = begun.elapsed().as_millis() as u64,
        "a partition has moved to another core"
    );
    Ok(moved?)
}

async fn settle(node: &Rc<Node>, key: &PartitionKey) -> Result<LogState, StorageError> {
    let partition = node.engine.partition(key).ok_or(StorageError::Moving)?;
    node.engine.settle(&partition).await
}

/// From one shard's hands to the other's. An error inside is the destination's, which then has not taken it.
async fn hand_over(
    node: &Rc<Node>,
    state: LogState,
    from: usize,
    to: usize,
) -> Result<Result<(), StorageError>, Stopping> {
    let key = state.key;
    let adopted = on(node, to, move |n| async move {
        let config = n.config_of(&key);
        n.engine.adopt(state, config).await
    })
    .await?;
    if let Err(error) = adopted {
        fail(node, from, key, &error).await?;
        return Ok(Err(error));
    }
    let gone = on(node, from, move |n| async move {
        n.replication.removed(&key);
        n.engine.let_go(&key).await
    })
    .await?;
    if let Err(error) = gone {
        fail(node, to, key, &error).await?;
    }
    Ok(Ok(()))
}

/// Takes a partition offline on the shard that has it after a failure.
async fn fail(node: &Rc<Node>, shard: usize, key: PartitionKey, error: &StorageError) -> Result<(), Stopping> {
    let reason = error.to_string();
    on(node, shard, move |n| async move {
        if let Some(partition) = n.engine.partition(&key) {
            n.engine.fail_move(&partition, &reason);
        }
        replication::resume(&n, &key);
    })
    .await
}

async fn on<T, F, W>(node: &Rc<Node>, shard: usize, work: W) -> Result<T, Stopping>
where
    T: Send + 'static,
    F: Future<Output = T> + 'static,
    W: FnOnce(Rc<Node>) -> F + Send + 'static,
{
    node.router.call(node, shard, work).await
}
