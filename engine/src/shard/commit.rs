//! The group commit: one group in flight, and what its completion moves.

use std::{rc::Rc, time::Duration};

use crate::{
    host::Host,
    journal::Group,
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
    /// Batches of a partition whose segment cannot be written, carried forward so that the ring is not pinned.
    Carried,
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
            if inner.journal.is_half_full() {
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
                    partition.entries_done.set(partition.entries_done.get() + 1);
                    partition.state.borrow_mut().advance_high_watermark(end_offset);
                    if !partition.dirty.replace(true) {
                        self.0.dirty.borrow_mut().push(Rc::clone(&partition));
                    }
                    if touched.last().is_none_or(|last| !Rc::ptr_eq(last, &partition)) {
                        touched.push(partition);
                    }
                }
                Completion::LogStart { partition, to, done } => {
                    partition.entries_done.set(partition.entries_done.get() + 1);
                    let gone = partition.state.borrow_mut().advance_log_start(to);
                    if !gone.is_empty() {
                        let (shard, partition) = (self.clone(), Rc::clone(&partition));
                        self.0
                            .host
                            .spawn(async move { shard.remove_segments(&partition, gone).await });
                    }
                    if !partition.dirty.replace(true) {
                        self.0.dirty.borrow_mut().push(Rc::clone(&partition));
                    }
                    done.wake_all();
                    touched.push(partition);
                }
                Completion::Carried => {}
            }
        }
        for partition in touched {
            partition.changed.wake_all();
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
