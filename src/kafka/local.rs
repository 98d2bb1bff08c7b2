//! What runs on the shard that owns a partition. Arguments and answers cross between shards; futures do not.

use std::{
    future::poll_fn,
    rc::Rc,
    sync::Arc,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    task::Poll,
    time::Duration,
};

use atomic_waker::AtomicWaker;
use bytes::Bytes;
use kafka_protocol::ResponseError;
use millrace_engine::{PartitionKey, ReadError, host::Host, kafka_batch::BatchInfo};

use super::{errors::Failure, times::Unpacked};
use crate::{
    node::Node,
    replication::{Slot, now_ms},
};

/// Least room for which a read goes to the disk, unless no more was asked for.
const DISK_READ_MIN: usize = 64 << 10;

/// Batches for one partition.
#[derive(Debug)]
pub struct Append {
    /// Where.
    pub key: PartitionKey,
    /// Leadership.
    pub epoch: i32,
    /// What, checked.
    pub batches: Vec<(BatchInfo, Bytes)>,
    /// Replicas in sync that it takes.
    pub min_insync: usize,
}

/// When an append is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wait {
    /// At once.
    No,
    /// When it is durable here.
    Durable,
    /// When every replica in sync has it, for at most so long.
    InSync(Duration),
}

/// An acknowledged append.
#[derive(Clone, Copy, Debug)]
pub struct Acked {
    /// First offset.
    pub base_offset: i64,
    /// First offset of the log.
    pub log_start: i64,
}

/// Appends to partitions of this shard in order, then waits until all are held as they are to be.
pub async fn append(node: &Rc<Node>, appends: Vec<Append>, wait: Wait) -> Vec<Result<Acked, Failure>> {
    let mut appended = Vec::with_capacity(appends.len());
    for append in appends {
        let bytes = append.batches.iter().map(|(_, b)| b.len()).sum();
        let permit = node.engine.admit(bytes).await;
        let (key, epoch, min_insync) = (append.key, append.epoch, append.min_insync);
        let slot = node.replication.slot(&key).ok_or_else(Failure::not_leader);
        let done = slot.and_then(|slot| {
            slot.check_leads(epoch)?;
            let now = now_ms(node);
            if matches!(wait, Wait::InSync(_)) {
                slot.check_in_sync(now, min_insync)?;
            }
            slot.check_sequel(now, &append.batches)?;
            let done = node.engine.append(key, epoch, append.batches, permit)?;
            Ok((slot, done))
        });
        appended.push((epoch, min_insync, done));
    }
    let mut acked = Vec::with_capacity(appended.len());
    for (epoch, min_insync, done) in appended {
        acked.push(match done {
            Err(failure) => Err(failure),
            Ok((slot, done)) => acknowledge(node, &slot, epoch, done.end_offset, min_insync, wait)
                .await
                .map(|()| Acked {
                    base_offset: done.base_offset,
                    log_start: done.log_start,
                }),
        });
    }
    acked
}

async fn acknowledge(
    node: &Rc<Node>,
    slot: &Slot,
    epoch: i32,
    end: i64,
    min_insync: usize,
    wait: Wait,
) -> Result<(), Failure> {
    match wait {
        Wait::No => Ok(()),
        Wait::InSync(patience) if slot.in_sync().is_some() => {
            let patience = async {
                node.host.sleep(patience).await;
                Err(Failure::new(
                    ResponseError::RequestTimedOut,
                    "the replicas in sync did not all answer in time",
                ))
            };
            futures_lite::future::or(slot.wait_acknowledged(epoch, end, true, min_insync), patience).await
        }
        Wait::Durable | Wait::InSync(_) => slot.wait_acknowledged(epoch, end, false, 1).await,
    }
}

/// One partition of a fetch.
#[derive(Clone, Debug)]
pub struct Read {
    /// Where.
    pub key: PartitionKey,
    /// Leadership.
    pub epoch: i32,
    /// The client knows of followers that may be read (Fetch 11 and above).
    pub followers: bool,
    /// Where the client stands, if it says so and replicas are chosen by it.
    pub rack: Option<Arc<str>>,
    /// From.
    pub offset: i64,
    /// Most bytes.
    pub max_bytes: usize,
    /// The epoch of the last record the client has, -1 unknown.
    pub last_fetched_epoch: i32,
}

/// What a partition has beyond what it gave.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum More {
    /// Nothing, or it is not to be read here.
    None,
    /// Records for which there was no room beside what others gave.
    BesideOthers,
    /// Records for which there is no room in what the client takes of one partition.
    BeyondItsOwn,
}

/// What a partition gave.
#[derive(Debug)]
pub struct Given {
    /// Whole batches.
    pub bytes: Bytes,
    /// What follows these and is visible, if anything does.
    pub more: More,
    /// Offset behind the last visible record.
    pub high_watermark: i64,
    /// First offset of the log.
    pub log_start: i64,
    /// Where the client should rather read (KIP-392).
    pub preferred: Option<i32>,
    /// Where the client's log diverged, if it did (KIP-595): epoch and its end offset.
    pub diverging: Option<(i32, i64)>,
}

/// Reads partitions of this shard in order, at most `room` bytes together; with `at_least_one` the first that has
/// anything gives a batch even if it is larger.
pub async fn read(
    node: &Rc<Node>,
    reads: &[Read],
    mut room: usize,
    mut at_least_one: bool,
) -> Vec<Result<Given, Failure>> {
    let mut given = Vec::with_capacity(reads.len());
    for read in reads {
        let most = room.min(read.max_bytes);
        let result = read_one(node, read, most, at_least_one).await;
        if let Ok(g) = &result {
            room = room.saturating_sub(g.bytes.len());
            at_least_one &= g.bytes.is_empty();
        }
        given.push(result);
    }
    given
}

async fn read_one(node: &Rc<Node>, read: &Read, max_bytes: usize, at_least_one: bool) -> Result<Given, Failure> {
    let slot = node.replication.slot(&read.key).ok_or_else(Failure::not_leader)?;
    let partition = Rc::clone(&slot.partition);
    slot.check_readable(read.epoch, read.followers)?;
    if let Some(closer) = read.rack.as_deref().and_then(|rack| slot.closer(node, rack)) {
        let status = partition.status();
        return Ok(Given {
            bytes: Bytes::new(),
            more: More::None,
            high_watermark: status.high_watermark,
            log_start: status.log_start,
            preferred: Some(closer),
            diverging: None,
        });
    }
    let leads = slot.check_leads(read.epoch).is_ok();
    let not_yet = || {
        Failure::new(
            ResponseError::OffsetNotAvailable,
            "this replica does not have that offset yet",
        )
    };
    if read.last_fetched_epoch >= 0 {
        let end = partition.with_state(|s| s.epochs.end_offset(read.last_fetched_epoch, s.log_end()));
        let status = partition.status();
        match end {
            // Only the leader's log says what is no record: a follower may lack what it has not been sent yet.
            Some((epoch, end)) if !leads && (epoch < read.last_fetched_epoch || end < read.offset) => {
                return Err(not_yet());
            }
            Some((epoch, end)) if epoch < read.last_fetched_epoch || end < read.offset => {
                return Ok(Given {
                    bytes: Bytes::new(),
                    more: More::None,
                    high_watermark: status.high_watermark,
                    log_start: status.log_start,
                    preferred: None,
                    diverging: Some((epoch, end)),
                });
            }
            _ => {}
        }
    }
    // The rest that others have left is not worth a read from the disk.
    let is_rest = !at_least_one && max_bytes < read.max_bytes.min(DISK_READ_MIN);
    let most = if is_rest && !partition.is_in_memory(read.offset) {
        0
    } else {
        max_bytes
    };
    let records = match node.engine.read(read.key, read.offset, most, at_least_one).await {
        // The leader has more; this copy will have it soon.
        Err(ReadError::OffsetOutOfRange { offset, log_end, .. }) if offset > log_end && !leads => {
            return Err(not_yet());
        }
        other => other?,
    };
    let more = match records.next_offset < records.high_watermark {
        false => More::None,
        true if max_bytes < read.max_bytes => More::BesideOthers,
        true => More::BeyondItsOwn,
    };
    Ok(Given {
        bytes: records.bytes.into(),
        more,
        high_watermark: records.high_watermark,
        log_start: records.log_start,
        preferred: None,
        diverging: None,
    })
}

/// What the waits of one fetch on several shards share.
#[derive(Debug)]
pub struct Together {
    min_bytes: u64,
    /// Bytes that the shards have found.
    found: AtomicU64,
    over: AtomicBool,
}

impl Together {
    /// Waits for so many bytes.
    #[must_use]
    pub fn new(min_bytes: u64) -> Self {
        Self {
            min_bytes,
            found: AtomicU64::new(0),
            over: AtomicBool::new(false),
        }
    }
}

/// One shard's part of a wait.
#[derive(Debug)]
pub struct Waiting {
    together: Arc<Together>,
    waker: AtomicWaker,
}

impl Waiting {
    /// A part of a wait.
    #[must_use]
    pub fn new(together: Arc<Together>) -> Self {
        Self {
            together,
            waker: AtomicWaker::new(),
        }
    }

    /// Ends the wait on all shards, and wakes this one's.
    pub fn cancel(&self) {
        self.together.over.store(true, Ordering::Release);
        self.waker.wake();
    }

    fn is_over(&self) -> bool {
        self.together.over.load(Ordering::Acquire)
    }

    /// Takes in what this shard has, where it had `before`. Returns whether it is enough with what the others have: whoever has the last
    /// bytes that are wanted ends the wait.
    fn is_enough_with(&self, bytes: u64, before: u64) -> bool {
        let found = &self.together.found;
        // Wraps where a log was cut, and so does the sum.
        let change = bytes.wrapping_sub(before);
        found.fetch_add(change, Ordering::AcqRel).wrapping_add(change) >= self.together.min_bytes
    }
}

/// Waits until partitions of this shard and of the others have the bytes wanted beyond the offsets given, for at most `time`; less long
/// where one of them can no longer be read as it was asked for, so that its client looks for another leader at once.
pub async fn wait_for_bytes(node: &Rc<Node>, reads: &[Read], time: Duration, waiting: Arc<Waiting>) {
    let mut slots = Vec::with_capacity(reads.len());
    for read in reads {
        let Some(slot) = node.replication.slot(&read.key) else {
            return;
        };
        slots.push(slot);
    }
    let places: Vec<_> = slots.iter().map(|s| s.partition.changes().place()).collect();
    let min_bytes = waiting.together.min_bytes;
    let mut before = 0;
    let enough = poll_fn(|cx| {
        if waiting.is_over() || node.is_stopping() {
            return Poll::Ready(());
        }
        waiting.waker.register(cx.waker());
        let mut bytes = 0;
        for (slot, read) in slots.iter().zip(reads) {
            let partition = &slot.partition;
            bytes += partition.bytes_available(read.offset, min_bytes.saturating_sub(bytes));
            if bytes >= min_bytes
                || partition.is_deleted()
                || partition.status().log_start > read.offset
                || slot.check_readable(read.epoch, read.followers).is_err()
            {
                return Poll::Ready(());
            }
        }
        if waiting.is_enough_with(bytes, std::mem::replace(&mut before, bytes)) {
            return Poll::Ready(());
        }
        for place in &places {
            place.register(cx);
        }
        if waiting.is_over() {
            return Poll::Ready(());
        }
        Poll::Pending
    });
    futures_lite::future::or(enough, node.host.sleep(time)).await;
}

/// What ListOffsets asks for.
#[derive(Clone, Copy, Debug)]
pub enum Lookup {
    /// Log start offset.
    Earliest,
    /// High watermark.
    Latest,
    /// The record with the largest timestamp (KIP-734).
    MaxTimestamp,
    /// The first record at or after a time.
    Time(i64),
}

/// Offset, timestamp and leader epoch found; -1 each for none.
#[derive(Clone, Copy, Debug)]
pub struct Looked {
    /// Offset.
    pub offset: i64,
    /// Timestamp.
    pub timestamp: i64,
    /// Leader epoch.
    pub leader_epoch: i32,
}

/// Looks an offset up in the log of a partition that this broker leads under `epoch`.
///
/// # Errors
/// [`Failure`].
pub async fn lookup(node: &Rc<Node>, key: PartitionKey, epoch: i32, lookup: Lookup) -> Result<Looked, Failure> {
    let slot = node.replication.slot(&key).ok_or_else(Failure::not_leader)?;
    slot.check_leads(epoch)?;
    let partition = &slot.partition;
    let status = partition.status();
    let at = |offset: i64| Looked {
        offset,
        timestamp: -1,
        leader_epoch: partition.with_state(|s| {
            s.epochs
                .epoch_of(offset.min(s.log_end() - 1))
                .or(s.epochs.latest())
                .unwrap_or(-1)
        }),
    };
    let none = Looked {
        offset: -1,
        timestamp: -1,
        leader_epoch: -1,
    };
    let times = Unpacked(node);
    let found = match lookup {
        Lookup::Earliest => return Ok(at(status.log_start)),
        Lookup::Latest => {
            slot.check_end_known()?;
            return Ok(at(status.high_watermark));
        }
        Lookup::Time(time) => node.engine.find_time(key, time, &times).await,
        Lookup::MaxTimestamp => node.engine.find_newest(key, &times).await,
    };
    let found = match found {
        // Retention moved the log start meanwhile.
        Err(ReadError::OffsetOutOfRange { .. }) => None,
        other => other?,
    };
    Ok(found.map_or(none, |f| Looked {
        offset: f.offset,
        timestamp: f.timestamp,
        leader_epoch: f.leader_epoch,
    }))
}
