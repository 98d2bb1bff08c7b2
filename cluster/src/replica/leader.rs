//! A leader's knowledge of its followers, the ISR and the high watermark.

use std::collections::{BTreeMap, VecDeque};

use millrace_engine::{LeaderEpoch, Offset, log::EpochCache};

use super::message::{Order, Says, Standing};
use crate::metadata::PartitionImage;

/// Bytes on their way to one follower of one partition before it has said that they are durable.
pub const IN_FLIGHT_BYTES: usize = 4 << 20;

/// What a follower is to be sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// An order without batches.
    Order {
        /// Number of the probe.
        round: u32,
        /// What.
        order: Order,
    },
    /// Batches from this offset on; [`Leader::sent`] is told of them.
    Batches {
        /// Number of the probe.
        round: u32,
        /// First offset.
        from: Offset,
    },
}

/// An ISR that the controller is to be asked for (KIP-497).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IsrWish {
    /// Number of the change that it follows.
    pub partition_epoch: i32,
    /// As it should be.
    pub isr: Vec<i32>,
}

/// An ISR that the controller was asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Asked {
    isr: Vec<i32>,
    /// Nobody knows whether it will be committed: it is to be asked for again.
    unanswered: bool,
}

/// How far the talk with a follower is.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Progress {
    /// To be sent this order first.
    Due(Order),
    /// Was sent an order, has not answered.
    Asked,
    /// Holds what the leader holds below `next`, and what follows is on its way to it.
    Following {
        next: Offset,
        /// End offset and bytes of what it has not said to be durable.
        unacked: VecDeque<(Offset, usize)>,
    },
}

#[derive(Clone, Debug)]
struct Follower {
    round: u32,
    progress: Progress,
    /// Below this its log is the leader's, durably; -1 while that is not known.
    durable_end: Offset,
    /// When it last held all that the leader held at that time.
    caught_up_ms: i64,
    /// A log end of the leader that the follower is yet to reach, and when that was its end.
    seen: (Offset, i64),
    /// Its log is known to start there or later, durably.
    log_start: Offset,
    /// It answers where its log starts.
    tells_log_start: bool,
    /// High watermark that it was told.
    told: Offset,
    owes_note: bool,
}

/// The leader of a partition with followers.
///
/// Invariants: the high watermark never goes back; it is not beyond the durable end of any member of the *maximal* ISR: the
/// committed one and the one that is being asked for together; it stands still while the committed one is smaller than
/// `min.insync.replicas`, so that whoever left such an ISR still has everything (KIP-966). The same holds for the low watermark.
#[derive(Clone, Debug)]
pub struct Leader {
    me: i32,
    epoch: LeaderEpoch,
    partition_epoch: i32,
    isr: Vec<i32>,
    min_insync: usize,
    wish: Option<Asked>,
    followers: BTreeMap<i32, Follower>,
    /// Where this leadership began: what is before it was written by others, and only a follower that has it all knows what
    /// the replicas agreed on.
    epoch_start: Offset,
    log_start: Offset,
    log_end: Offset,
    durable_end: Offset,
    high_watermark: Offset,
    low_watermark: Offset,
    lag_ms: i64,
}

impl Leader {
    /// A leadership that begins now, on a log that ends at `log_end`.
    #[must_use]
    pub fn new(me: i32, epoch: LeaderEpoch, log_end: Offset, high_watermark: Offset, lag_ms: i64) -> Self {
        Self {
            me,
            epoch,
            partition_epoch: -1,
            isr: Vec::new(),
            min_insync: usize::MAX,
            wish: None,
            followers: BTreeMap::new(),
            epoch_start: log_end,
            log_start: 0,
            log_end,
            durable_end: high_watermark,
            high_watermark,
            low_watermark: 0,
            lag_ms,
        }
    }

    /// The committed metadata of this leadership, and how many replicas must be in sync for the high watermark to move.
    pub fn committed(&mut self, image: &PartitionImage, min_insync: usize, now_ms: i64) {
        if image.partition_epoch < self.partition_epoch {
            return;
        }
        self.min_insync = min_insync;
        if image.partition_epoch > self.partition_epoch {
            self.wish = None;
        }
        self.partition_epoch = image.partition_epoch;
        self.isr.clone_from(&image.isr);
        let replicas = &image.replicas;
        self.followers.retain(|node, _| replicas.contains(node));
        for node in replicas.iter().filter(|n| **n != self.me) {
            self.followers.entry(*node).or_insert_with(|| Follower {
                round: 0,
                progress: Progress::Due(Order::Probe),
                durable_end: -1,
                caught_up_ms: now_ms,
                seen: (self.log_end, now_ms),
                log_start: 0,
                tells_log_start: false,
                told: -1,
                owes_note: false,
            });
        }
        self.update();
    }

    /// The leadership's number.
    #[must_use]
    pub fn epoch(&self) -> LeaderEpoch {
        self.epoch
    }

    /// The committed ISR.
    #[must_use]
    pub fn isr(&self) -> &[i32] {
        &self.isr
    }

    /// Nodes that follow.
    pub fn followers(&self) -> impl Iterator<Item = i32> {
        self.followers.keys().copied()
    }

    /// What the replicas in sync agree on.
    #[must_use]
    pub fn high_watermark(&self) -> Offset {
        self.high_watermark
    }

    /// What stands before it is deleted durably on every replica in sync, so that no later leader has it.
    #[must_use]
    pub fn low_watermark(&self) -> Offset {
        self.low_watermark
    }

    /// Whether the high watermark has reached what stood in the log when this leadership began: before that nobody can say
    /// what the end of the log is to a consumer.
    #[must_use]
    pub fn knows_the_end(&self) -> bool {
        self.high_watermark >= self.epoch_start
    }

    /// The leader's own log has moved.
    pub fn local(&mut self, log_start: Offset, log_end: Offset, durable_end: Offset) {
        if log_start > self.log_start {
            self.log_start = log_start;
            for follower in self.followers.values_mut() {
                follower.owes_note |= follower.lacks_log_start(log_start);
            }
        }
        self.log_end = log_end;
        self.durable_end = durable_end;
        self.update();
    }

    /// A follower answers where its log starts, or does not: which version its stream speaks.
    pub fn connected(&mut self, node: i32, tells_log_start: bool) {
        if let Some(follower) = self.followers.get_mut(&node) {
            follower.tells_log_start = tells_log_start;
        }
    }

    fn update(&mut self) {
        if let Some(agreed) = self.least(self.durable_end, |f| f.durable_end) {
            self.high_watermark = self.high_watermark.max(agreed.min(self.durable_end));
        }
        if let Some(deleted) = self.least(self.log_start, |f| f.log_start) {
            self.low_watermark = self.low_watermark.max(deleted);
        }
    }

    /// The least of what the leader and the other members of the maximal ISR hold; `None` while too few are in sync.
    fn least(&self, own: Offset, held: impl Fn(&Follower) -> Offset) -> Option<Offset> {
        if self.isr.len() < self.min_insync || !self.isr.contains(&self.me) {
            return None;
        }
        let members = self.isr.iter().chain(self.wish.iter().flat_map(|w| &w.isr));
        members
            .map(|node| match self.followers.get(node) {
                Some(follower) => held(follower),
                None if *node == self.me => own,
                // A replica that is being removed, or one that metadata has yet to name.
                None => -1,
            })
            .min()
    }

    /// What a follower is to be sent now, if anything.
    pub fn next(&mut self, node: i32) -> Option<Next> {
        let follower = self.followers.get_mut(&node)?;
        match &follower.progress {
            Progress::Due(order) => {
                let order = *order;
                follower.round += 1;
                follower.progress = Progress::Asked;
                Some(Next::Order {
                    round: follower.round,
                    order,
                })
            }
            Progress::Asked => None,
            Progress::Following { next, unacked } => {
                let in_flight: usize = unacked.iter().map(|(_, bytes)| bytes).sum();
                // A new log start goes first: a busy follower would never be told of it alone.
                let starts_later = follower.owes_note && follower.lacks_log_start(self.log_start);
                if !starts_later && *next < self.log_end && in_flight < IN_FLIGHT_BYTES {
                    return Some(Next::Batches {
                        round: follower.round,
                        from: *next,
                    });
                }
                if !follower.owes_note {
                    return None;
                }
                follower.owes_note = false;
                follower.told = self.high_watermark;
                Some(Next::Order {
                    round: follower.round,
                    order: Order::Note,
                })
            }
        }
    }

    /// Looks whether a follower that has everything was not told the high watermark with it, or has not said that its log starts where
    /// the leader's does; then [`next`](Self::next) tells it alone. To be asked now and then only: batches that follow carry the high
    /// watermark, too.
    pub fn owes_note(&mut self, node: i32) -> bool {
        let (high_watermark, log_start) = (self.high_watermark, self.log_start);
        let Some(follower) = self.followers.get_mut(&node) else {
            return false;
        };
        let idle = matches!(&follower.progress, Progress::Following { next, unacked } if *next == self.log_end && unacked.is_empty());
        follower.owes_note = idle && follower.told < high_watermark || follower.lacks_log_start(log_start);
        follower.owes_note
    }

    /// Batches up to `end` are on their way to a follower.
    pub fn sent(&mut self, node: i32, round: u32, end: Offset, bytes: usize) {
        let high_watermark = self.high_watermark;
        if let Some(follower) = self.followers.get_mut(&node).filter(|f| f.round == round)
            && let Progress::Following { next, unacked } = &mut follower.progress
        {
            *next = end;
            unacked.push_back((end, bytes));
            follower.told = high_watermark;
        }
    }

    /// What was on its way to a follower may be lost, or cannot be sent: the talk begins anew.
    pub fn lost(&mut self, node: i32) {
        if let Some(follower) = self.followers.get_mut(&node) {
            follower.progress = Progress::Due(Order::Probe);
            // Answers to what was sent before mean nothing any more.
            follower.round += 1;
        }
    }

    /// A follower has answered. Returns whether it holds something new durably.
    pub fn answered(
        &mut self,
        node: i32,
        round: u32,
        says: Says,
        epochs: &EpochCache,
        log_start: Offset,
        now_ms: i64,
    ) -> bool {
        let log_end = self.log_end;
        let Some(follower) = self.followers.get_mut(&node).filter(|f| f.round == round) else {
            return false;
        };
        match says {
            Says::Stands(standing) => {
                follower.progress = agree(standing, epochs, log_start, log_end);
                // What it said before means nothing: it may have lost its disk since.
                follower.durable_end = -1;
                follower.log_start = 0;
                if let Progress::Following { .. } = follower.progress {
                    follower.moved_to(standing.durable_end, log_end, now_ms);
                }
            }
            Says::Durable(end) => {
                // Only what was sent, so that a confused follower cannot move the high watermark.
                let Progress::Following { next, unacked } = &mut follower.progress else {
                    return false;
                };
                let end = end.min(*next);
                while unacked.front().is_some_and(|(e, _)| *e <= end) {
                    unacked.pop_front();
                }
                follower.moved_to(end, log_end, now_ms);
            }
            Says::LogStart(at) => follower.log_start = follower.log_start.max(at),
            Says::NotYet | Says::Stale | Says::Elsewhere { .. } => {
                follower.progress = Progress::Due(Order::Probe);
                return false;
            }
            Says::Failed => {
                // Nobody should count on it any longer.
                follower.progress = Progress::Due(Order::Probe);
                follower.durable_end = -1;
                follower.caught_up_ms = now_ms - self.lag_ms - 1;
                return false;
            }
        }
        self.update();
        true
    }

    /// The ISR that the controller should be asked for, if it should be another (not asked for yet).
    pub fn isr_wish(&mut self, now_ms: i64, may_join: impl Fn(i32) -> bool) -> Option<IsrWish> {
        match &mut self.wish {
            Some(wish) if wish.unanswered => {
                wish.unanswered = false;
                return Some(IsrWish {
                    partition_epoch: self.partition_epoch,
                    isr: wish.isr.clone(),
                });
            }
            Some(_) => return None,
            None if !self.isr.contains(&self.me) => return None,
            None => {}
        }
        let stays = |node: &i32| {
            *node == self.me
                || self.followers.get(node).is_some_and(|f| {
                    f.durable_end >= self.log_end || now_ms.saturating_sub(f.caught_up_ms) <= self.lag_ms
                })
        };
        let joins = |node: &i32, f: &Follower| {
            !self.isr.contains(node)
                && matches!(f.progress, Progress::Following { .. })
                && f.durable_end >= self.high_watermark
                && f.durable_end >= self.epoch_start
                // One that lacks what was deleted could bring it back as a leader.
                && !f.lacks_log_start(self.log_start)
                && may_join(*node)
        };
        let mut isr: Vec<i32> = self.isr.iter().copied().filter(stays).collect();
        isr.extend(self.followers.iter().filter(|(n, f)| joins(n, f)).map(|(n, _)| *n));
        if isr == self.isr {
            return None;
        }
        self.wish = Some(Asked {
            isr: isr.clone(),
            unanswered: false,
        });
        Some(IsrWish {
            partition_epoch: self.partition_epoch,
            isr,
        })
    }

    /// Nobody knows whether the wish will be committed. It binds until that is known, and [`isr_wish`](Self::isr_wish) gives
    /// it again.
    pub fn wish_unanswered(&mut self) {
        if let Some(wish) = &mut self.wish {
            wish.unanswered = true;
        }
    }

    /// The controller did not take the wish, and never will; what holds is what is committed, and was told.
    pub fn wish_refused(&mut self) {
        self.wish = None;
        self.update();
    }
}

impl Follower {
    /// Whether it follows, and has yet to say that its log starts at `log_start` or later.
    fn lacks_log_start(&self, log_start: Offset) -> bool {
        self.tells_log_start && self.log_start < log_start && matches!(self.progress, Progress::Following { .. })
    }

    fn moved_to(&mut self, durable_end: Offset, log_end: Offset, now_ms: i64) {
        self.durable_end = self.durable_end.max(durable_end);
        if self.durable_end >= log_end {
            self.caught_up_ms = now_ms;
        }
        // The mark stays until it is reached: there is always something on its way to a follower of a busy leader.
        if self.durable_end >= self.seen.0 {
            self.caught_up_ms = self.caught_up_ms.max(self.seen.1);
            self.seen = (log_end, now_ms);
        }
    }
}

/// What follows from where a follower's log stands.
fn agree(standing: Standing, epochs: &EpochCache, log_start: Offset, log_end: Offset) -> Progress {
    if standing.log_end < log_start {
        return Progress::Due(Order::Restart { at: log_start });
    }
    if standing.last_epoch < 0 {
        // An empty log: nothing in it can differ.
        return if standing.log_end <= log_end {
            Progress::Following {
                next: standing.log_end,
                unacked: VecDeque::new(),
            }
        } else {
            Progress::Due(Order::Restart { at: log_start })
        };
    }
    match epochs.end_offset(standing.last_epoch, log_end) {
        Some((epoch, end)) if epoch == standing.last_epoch && end >= standing.log_end => Progress::Following {
            next: standing.log_end,
            unacked: VecDeque::new(),
        },
        Some((epoch, end)) => Progress::Due(Order::Truncate { epoch, end }),
        // It ends in an epoch of which the leader has nothing left.
        None => Progress::Due(Order::Restart { at: log_start }),
    }
}
