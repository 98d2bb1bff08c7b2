//! What a follower does with a leader's requests: each is answered, an append when it is durable.

use std::{
    cell::RefCell,
    collections::VecDeque,
    rc::Rc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use millrace_cluster::{
    metadata::record,
    peer::LOG_START_VERSION,
    replica::{
        Answer, Request,
        follower::{self, Decision, Log},
        message::{self, Says},
    },
};
use millrace_engine::{AppendError, PartitionKey, StorageError, batch::Batch, shard::Partition, sync::WaitList};
use millrace_net::quic::{FrameReceiver, FrameSender, LinkError};

use super::{Role, Slot};
use crate::{coordinator::brokers, node::Node};

/// A copy that fails again so soon is left alone: the disk is likely to be the reason.
const ANEW_PAUSE: Duration = Duration::from_secs(600);

/// Answers on their way to a leader.
#[derive(Default)]
struct Outbox {
    /// Its leader is answered where logs start.
    tells_log_start: bool,
    answers: RefCell<VecDeque<Bytes>>,
    wake: WaitList,
}

impl Outbox {
    fn push(&self, request: &Request, says: Says) {
        let answer = Answer {
            key: request.key,
            epoch: request.epoch,
            round: request.round,
            says,
        };
        self.answers.borrow_mut().push_back(record::encode(&answer).into());
        self.wake.wake_all();
    }

    async fn send(&self, mut tx: FrameSender) -> LinkError {
        loop {
            self.wake
                .wait(|| (!self.answers.borrow().is_empty()).then_some(()))
                .await;
            let answers: Vec<Vec<Bytes>> = self.answers.borrow_mut().drain(..).map(|a| vec![a]).collect();
            if let Err(error) = tx.send(answers).await {
                return error;
            }
        }
    }
}

/// Serves a leader's stream until it ends.
///
/// # Errors
/// Why it ended.
pub async fn serve(
    node: &Rc<Node>,
    from: i32,
    version: u16,
    tx: FrameSender,
    mut rx: FrameReceiver,
) -> Result<(), LinkError> {
    let outbox = Rc::new(Outbox {
        tells_log_start: version >= LOG_START_VERSION,
        ..Outbox::default()
    });
    let handling = async {
        loop {
            match rx.next().await {
                Ok(Some(frame)) => match message::decode_request(&frame) {
                    Ok((request, batches)) => handle(node, &outbox, from, request, batches).await,
                    Err(error) => return LinkError::Garbage(error.to_string()),
                },
                Ok(None) => return LinkError::Lost("the leader has closed it".into()),
                Err(error) => return error,
            }
        }
    };
    Err(futures_lite::future::or(handling, outbox.send(tx)).await)
}

async fn handle(node: &Rc<Node>, outbox: &Rc<Outbox>, from: i32, request: Request, batches: Vec<Batch>) {
    let key = PartitionKey::from(request.key);
    let slot = match node.replication.slot(&key) {
        Some(slot) => slot,
        None => {
            let says = match node.view().placement.get(&key) {
                Some(shard) if *shard as usize != node.shard => Says::Elsewhere { shard: *shard },
                _ => Says::NotYet,
            };
            return outbox.push(&request, says);
        }
    };
    let _turn = slot.turn.acquire(1).await;
    if slot.partition.is_deleted() {
        return outbox.push(&request, Says::NotYet);
    }
    let partition = &slot.partition;
    // A log that takes nothing more, or is damaged, is no copy to count on.
    if partition.check_healthy().is_err() {
        mend(node, &slot, from);
        return outbox.push(&request, Says::Failed);
    }
    if node.engine.is_clearing(&key) {
        return outbox.push(&request, Says::NotYet);
    }
    let follows = match &*slot.role.borrow() {
        Role::Follows(leader) => Some(*leader),
        _ => None,
    };
    let first = batches.first().map(|b| b.header.base_offset);
    let decision = look(partition, |log| {
        follower::decide(
            &request,
            from,
            first,
            (follows, slot.epoch.get()),
            slot.stood.get(),
            log,
        )
    });
    let done: Result<Option<Says>, String> = match decision {
        Decision::Answer(says) => Ok(Some(says)),
        Decision::Note => {
            note(node, partition, &request, outbox.tells_log_start.then_some(outbox));
            Ok(None)
        }
        Decision::Truncate { to } => {
            let log_end = partition.status().log_end;
            if to < log_end {
                tracing::info!(partition = %key, log_end, to, leader = from, "the log differs from its leader's and is cut");
            }
            let cut = node.engine.truncate(partition, to).await;
            cut.map(|()| Some(stands(partition))).map_err(|e| e.to_string())
        }
        Decision::Restart { at } => {
            tracing::info!(partition = %key, at, leader = from, "the log ends before its leader's begins, and begins anew there");
            let cut = node.engine.restart_at(partition, at).await;
            cut.map(|()| Some(stands(partition))).map_err(|e| e.to_string())
        }
        Decision::Append => append(node, outbox, &slot, &request, batches)
            .await
            .map_err(|e| e.to_string()),
    };
    match done {
        Ok(Some(says)) => {
            let mut stood = slot.stood.get();
            stood.note(&request, says);
            slot.stood.set(stood);
            outbox.push(&request, says);
        }
        Ok(None) => slot.failed.set(false),
        Err(error) => {
            // Once until it can again: the leader keeps asking.
            if !slot.failed.replace(true) {
                tracing::error!(partition = %key, error, leader = from, "a follower cannot do what its leader asks");
            }
            outbox.push(&request, Says::Failed);
        }
    }
}

/// Begins a failed copy anew, once it is sure that nobody counts on it and that `leader` has what it had.
fn mend(node: &Rc<Node>, slot: &Rc<Slot>, leader: i32) {
    let key = slot.key;
    let lately = |at: &Instant| at.elapsed() < ANEW_PAUSE;
    let begun = &node.replication.begun_anew;
    // Where the whole shard has failed, its disk is the reason. After a move that has failed two checkpoints may speak of it.
    if node.engine.poisoned().is_some() || slot.partition.is_moving() || begun.borrow().get(&key).is_some_and(lately) {
        return;
    }
    begun.borrow_mut().insert(key, Instant::now());
    let (node, slot) = (Rc::clone(node), Rc::clone(slot));
    glommio::spawn_local(async move {
        if !brokers::is_spare(&node, key.topic, key.partition, leader).await {
            node.replication.begun_anew.borrow_mut().remove(&key);
            return;
        }
        let _turn = slot.turn.acquire(1).await;
        if slot.partition.is_deleted() {
            return;
        }
        tracing::warn!(partition = %key, leader, "a copy has failed and begins anew: its leader has all of it");
        node.begin_anew(key);
    })
    .detach();
}

fn look<T>(partition: &Partition, look: impl FnOnce(Log<'_>) -> T) -> T {
    partition.with_state(|s| {
        look(Log {
            log_start: s.log_start(),
            log_end: s.log_end(),
            durable_end: s.durable_end(),
            epochs: &s.epochs,
        })
    })
}

fn stands(partition: &Partition) -> Says {
    look(partition, |log| Says::Stands(log.standing()))
}

/// Takes in the leader's high watermark and log start; answers where the log starts then, durably, if that is to be told.
fn note(node: &Rc<Node>, partition: &Rc<Partition>, request: &Request, tell: Option<&Rc<Outbox>>) {
    node.engine.advance_high_watermark(partition, request.high_watermark);
    let outbox = tell.filter(|_| request.log_start > 0).map(Rc::clone);
    let status = partition.status();
    if request.log_start <= status.log_start || request.log_start > status.high_watermark {
        if let Some(outbox) = outbox {
            outbox.push(request, Says::LogStart(status.log_start));
        }
        return;
    }
    let (node, partition, request) = (Rc::clone(node), Rc::clone(partition), request.clone());
    glommio::spawn_local(async move {
        match node.engine.delete_records(&partition, request.log_start).await {
            Ok(log_start) => {
                if let Some(outbox) = outbox {
                    outbox.push(&request, Says::LogStart(log_start));
                }
            }
            Err(StorageError::Moving | StorageError::Left) => {}
            Err(error) => {
                tracing::warn!(partition = %partition.key, %error, "the log start could not follow the leader's");
            }
        }
    })
    .detach();
}

async fn append(
    node: &Rc<Node>,
    outbox: &Rc<Outbox>,
    slot: &Rc<Slot>,
    request: &Request,
    batches: Vec<Batch>,
) -> Result<Option<Says>, AppendError> {
    let bytes = batches.iter().map(|b| b.payload.len()).sum();
    let permit = node.engine.admit(bytes).await;
    // Waiting for room took time.
    if slot.epoch.get() != request.epoch {
        return Ok(Some(Says::Stale));
    }
    let end = node.engine.append_replicated(slot.key, batches, permit)?;
    note(node, &slot.partition, request, None);
    let (node, outbox, slot, request) = (Rc::clone(node), Rc::clone(outbox), Rc::clone(slot), request.clone());
    glommio::spawn_local(async move {
        let says = match slot.partition.wait_durable(end).await {
            Ok(()) => Says::Durable(end),
            Err(_) => Says::Failed,
        };
        if slot.epoch.get() == request.epoch {
            note(&node, &slot.partition, &request, None);
        }
        outbox.push(&request, says);
    })
    .detach();
    Ok(None)
}
