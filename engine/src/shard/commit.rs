//! The group commit: one group in flight, and what its completion moves.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::Duration,
};

use crate::{
    host::Host,
    journal::Group,
    log::{Cut, SegmentMeta},
    shard::{Shard, partition::Partition},
    sync::WaitList,
    types::Offset,
};

/// What an entry of the journal completes.
pub(crate) enum Completion {
    /// A batch: everything below `end_offset` is acknowledged.
    Batch {
        partition: Rc<Partition>,
        end_offset: Offset,
    },
    /// A new log start.
    LogStart {
        partition: Rc<Partition>,
        to: Offset,
        done: Rc<WaitList>,
    },
    /// The log is cut.
    Cut {
        partition: Rc<Partition>,
        cut: Cut,
        done: Rc<CutDone>,
    },
    /// Batches of a partition whose segment cannot be written, carried forward so that the ring is not pinned.
    Carried { left: Rc<Carried> },
}

/// A cut on its way, and then the segments it left without anything.
#[derive(Default)]
pub(crate) struct CutDone {
    pub gone: RefCell<Option<Vec<SegmentMeta>>>,
    pub changed: WaitList,
}

/// Batches being carried forward.
#[derive(Default)]
pub(crate) struct Carried {
    pub left: Cell<usize>,
    pub changed: WaitList,
}

impl Carried {
    fn finish_one(&self) {
        self.left.set(self.left.get() - 1);
        self.changed.wake_all();
    }
}

impl<H: Host> Shard<H> {
    pub(crate) async fn commit_loop(&self) {
        let inner = &self.0;
        loop {
            let group = inner.journal.next_group().await;
            match inner.journal.write(&group).await {
                Ok(_) => self.complete(group),
                Err(error) => {
                    self.poison_shard(&error);
                    return;
                }
            }
            if inner.journal.wants_write_back(inner.dirty.borrow().len()) {
                self.want_write_back();
            }
        }
    }

    fn complete(&self, group: Group<Completion>) {
        let counters = &self.0.counters;
        counters.groups.set(counters.groups.get() + 1);
        let mut touched: Vec<Rc<Partition>> = Vec::with_capacity(group.entries.len().min(64));
        for entry in group.entries {
            match entry.context {
                Completion::Batch { partition, end_offset } => {
                    {
                        let mut state = partition.state.borrow_mut();
                        state.advance_durable_end(end_offset);
                        if !partition.replicated.get() {
                            let end = state.durable_end();
                            state.advance_high_watermark(end);
                        }
                    }
                    if touched.last().is_none_or(|last| !Rc::ptr_eq(last, &partition)) {
                        touched.push(partition);
                    }
                }
                Completion::LogStart { partition, to, done } => {
                    let gone = partition.state.borrow_mut().advance_log_start(to);
                    if !gone.is_empty() {
                        let (shard, partition) = (self.clone(), Rc::clone(&partition));
                        self.0
                            .host
                            .spawn(async move { shard.remove_segments(&partition, gone).await });
                    }
                    self.mark_dirty(&partition);
                    done.wake_all();
                    touched.push(partition);
                }
                Completion::Cut { partition, cut, done } => {
                    // At once, so that whatever looks at the log from here on, a checkpoint above all, sees it cut.
                    let gone = self.apply_cut(&partition, &cut);
                    done.gone.replace(Some(gone));
                    done.changed.wake_all();
                    touched.push(partition);
                }
                Completion::Carried { left } => left.finish_one(),
            }
        }
        for partition in touched {
            partition.changed.wake_all();
        }
    }

    /// Notes that a partition has something that no checkpoint says yet.
    pub(crate) fn mark_dirty(&self, partition: &Rc<Partition>) {
        if !partition.dirty.replace(true) {
            self.0.dirty.borrow_mut().push(Rc::clone(partition));
        }
    }

    /// Arranges that relaxed appends are flushed after `flush.ms`; one timer for the whole shard.
    pub(crate) fn arm_flush_timer(&self, flush_ms: i64) {
        let Ok(ms) = u64::try_from(flush_ms) else { return };
        // "Never", as Kafka spells it, and anything beyond a month.
        if ms > 30 * 24 * 3_600_000 || self.0.flush_timer.replace(true) {
            return;
        }
        let shard = self.clone();
        self.0.host.spawn(async move {
            shard.0.host.sleep(Duration::from_millis(ms)).await;
            shard.0.flush_timer.set(false);
            if let Err(error) = shard.0.journal.flush().await {
                shard.poison_shard(&error);
            }
        });
    }
}
