//! A follower's decisions.

use millrace_engine::{LeaderEpoch, Offset, log::EpochCache};

use super::message::{Order, Request, Says, Standing};

/// A follower's log, as far as its decisions look at it.
#[derive(Clone, Copy, Debug)]
pub struct Log<'a> {
    /// First offset.
    pub log_start: Offset,
    /// Next offset.
    pub log_end: Offset,
    /// Offset behind the last one that is durable.
    pub durable_end: Offset,
    /// Where each leadership began.
    pub epochs: &'a EpochCache,
}

impl Log<'_> {
    /// Where it stands.
    #[must_use]
    pub fn standing(&self) -> Standing {
        Standing {
            log_end: self.log_end,
            durable_end: self.durable_end,
            last_epoch: self.epochs.latest().unwrap_or(-1),
        }
    }
}

/// When a copy last said where its log stands: in answer to what.
///
/// A leader has a log cut because of what the follower said, in the round after. On a connection that has broken such an order may lie
/// unread for long: meanwhile the leader has asked anew, and what the order would cut may be what was appended since.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stood {
    last: Option<(LeaderEpoch, u32)>,
}

impl Stood {
    /// The copy answers a request; notes whether it says where it stands.
    pub fn note(&mut self, request: &Request, says: Says) {
        if let Says::Stands(_) = says {
            self.last = self.last.max(Some((request.epoch, request.round)));
        }
    }

    /// Whether an order is the leader's word on what the copy said last.
    fn is_answered_by(self, request: &Request) -> bool {
        self.last
            .is_some_and(|(epoch, round)| (epoch, round.wrapping_add(1)) == (request.epoch, request.round))
    }
}

/// What is to be done with a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Answer this, and nothing else: in particular the leader's high watermark means nothing to a log that may not be the
    /// leader's.
    Answer(Says),
    /// Take note of high watermark and log start: the log is the leader's.
    Note,
    /// Cut the log there, then answer where it stands.
    Truncate {
        /// The new log end.
        to: Offset,
    },
    /// Empty the log, then answer where it stands.
    Restart {
        /// The new log start and end.
        at: Offset,
    },
    /// Append the batches, take note of high watermark and log start; answer when they are durable.
    Append,
}

/// Decides on a request of `from` whose batches, if it brings any, begin at `first`. `follows` is the leader that the metadata
/// says this copy follows, with the epoch that it knows of; the leader is `None` while this copy leads or nobody does. `stood` is told
/// of every answer.
#[must_use]
pub fn decide(
    request: &Request,
    from: i32,
    first: Option<Offset>,
    follows: (Option<i32>, LeaderEpoch),
    stood: Stood,
    log: Log<'_>,
) -> Decision {
    let (leader, epoch) = follows;
    if request.epoch > epoch {
        return Decision::Answer(Says::NotYet);
    }
    if request.epoch < epoch || leader != Some(from) {
        return Decision::Answer(Says::Stale);
    }
    match request.order {
        Order::Probe => Decision::Answer(Says::Stands(log.standing())),
        Order::Note => Decision::Note,
        Order::Truncate { .. } | Order::Restart { .. } if !stood.is_answered_by(request) => {
            Decision::Answer(Says::Stands(log.standing()))
        }
        Order::Truncate { epoch, end } => Decision::Truncate {
            to: cut_at(log, epoch, end),
        },
        Order::Restart { at } => Decision::Restart { at },
        // A gap, or what is there already: the leader is to look again.
        Order::Append if first != Some(log.log_end) => Decision::Answer(Says::Stands(log.standing())),
        Order::Append => Decision::Append,
    }
}

/// Where a log that a leader wants cut at `end` of `epoch` is to be cut: neither what the leader does not have of that epoch
/// nor anything of a later one stays (KIP-279).
fn cut_at(log: Log<'_>, epoch: LeaderEpoch, end: Offset) -> Offset {
    match log.epochs.end_offset(epoch, log.log_end) {
        Some((_, own_end)) => end.min(own_end),
        // Everything here is of later epochs.
        None => log.log_start,
    }
    .clamp(log.log_start, log.log_end)
}
