//! The group commit: few groups in flight, and what their completion moves, in order.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::Future,
    ops::ControlFlow,
    pin::Pin,
    rc::Rc,
    time::Duration,
};

use futures_lite::future;

use crate::{
    error::StorageError,
    host::Host,
    journal::{Group, WRITES_MAX, Way, Written},
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
    LogStart { partition: Rc<Partition>, to: Offset },
    /// Everything of the partition that came before.
    Settled {
        partition: Rc<Partition>,
        done: Rc<Cell<bool>>,
    },
    /// The log is cut.
    Cut {
        partition: Rc<Partition>,
        cut: Cut,
        /// Then the segments it left without anything.
        done: Rc<RefCell<Option<Vec<SegmentMeta>>>>,
    },
    /// Batches of a partition whose segment cannot be written, carried forward so that the ring is not pinned.
    Carried { left: Rc<Carried> },
    /// A copy that has left says nothing more.
    Cleared { count: Rc<Cell<usize>> },
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

type Outcome = (Group<Completion>, Result<Written, StorageError>);

/// A group on its way to the disk.
struct Write {
    /// Others may be on their way meanwhile if theirs is the same.
    way: Way,
    state: State,
}

enum State {
    UnderWay(Pin<Box<dyn Future<Output = Outcome>>>),
    Through(Group<Completion>, Result<Written, StorageError>),
}

impl Write {
    /// Waits until the disk is through with it; may be asked again.
    async fn through(&mut self) {
        if let State::UnderWay(write) = &mut self.state {
            let (group, written) = write.await;
            self.state = State::Through(group, written);
        }
    }
}

impl<H: Host> Shard<H> {
    pub(crate) async fn commit_loop(&self) {
        let journal = &self.0.journal;
        let mut writes: VecDeque<Write> = VecDeque::with_capacity(WRITES_MAX);
        loop {
            let group = if writes.len() < WRITES_MAX {
                let next = async { Some(journal.next_group().await) };
                match writes.front_mut() {
                    Some(oldest) => {
                        let through = async {
                            oldest.through().await;
                            None
                        };
                        future::or(through, next).await
                    }
                    None => next.await,
                }
            } else {
                None
            };
            let Some(group) = group else {
                if self.finish_oldest(&mut writes).await.is_break() {
                    return;
                }
                continue;
            };
            while !writes.is_empty() {
                let way = journal.way(&group);
                if way != Way::Alone && writes.iter().all(|w| w.way == way) {
                    break;
                }
                if self.finish_oldest(&mut writes).await.is_break() {
                    return;
                }
            }
            let way = journal.way(&group);
            let shard = self.clone();
            let mut write = Write {
                way,
                state: State::UnderWay(Box::pin(async move {
                    let written = shard.0.journal.write(&group).await;
                    (group, written)
                })),
            };
            // It begins now, whatever else is waited for.
            future::poll_once(write.through()).await;
            writes.push_back(write);
        }
    }

    /// Waits for the oldest write, and takes it in.
    async fn finish_oldest(&self, writes: &mut VecDeque<Write>) -> ControlFlow<()> {
        let Some(mut oldest) = writes.pop_front() else {
            return ControlFlow::Continue(());
        };
        oldest.through().await;
        let State::Through(group, written) = oldest.state else {
            return ControlFlow::Continue(());
        };
        let inner = &self.0;
        match written {
            Ok(written) => {
                inner.journal.finish(written);
                self.complete(group);
            }
            Err(error) => {
                self.poison_shard(&error);
                return ControlFlow::Break(());
            }
        }
        inner.pace.set_behind(inner.journal.is_behind());
        if inner.journal.wants_write_back(inner.dirty.borrow().len()) {
            self.want_write_back();
        }
        ControlFlow::Continue(())
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
                // It has left: its files may be those of the next copy by now. Who waits is told.
                Completion::LogStart { partition, .. } | Completion::Cut { partition, .. }
                    if partition.deleted.get() =>
                {
                    touched.push(partition);
                }
                Completion::LogStart { partition, to } => {
                    partition.marks.borrow_mut().push(entry.batch.header);
                    let gone = partition.state.borrow_mut().advance_log_start(to);
                    if !gone.is_empty() {
                        self.remove_segments(&partition, gone);
                    }
                    self.mark_dirty(&partition);
                    touched.push(partition);
                }
                Completion::Settled { partition, done } => {
                    done.set(true);
                    touched.push(partition);
                }
                Completion::Cut { partition, cut, done } => {
                    // At once, so that whatever looks at the log from here on, a checkpoint above all, sees it cut.
                    partition.marks.borrow_mut().push(entry.batch.header);
                    let gone = self.apply_cut(&partition, &cut);
                    done.replace(Some(gone));
                    touched.push(partition);
                }
                Completion::Carried { left } => left.finish_one(),
                Completion::Cleared { count } => {
                    count.set(count.get() + 1);
                    self.0.clearing_changed.wake_all();
                }
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
