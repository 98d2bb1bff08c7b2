//! Connections that nothing comes or goes over are closed: their peers may be gone without a word, and what is held for them, the memory
//! of a request or of an answer, and their place among `max.connections`, is wanted by others.

use std::{
    cell::RefCell,
    net::SocketAddr,
    rc::{Rc, Weak},
    time::{Duration, Instant},
};

use millrace_net::traffic::Traffic;

use crate::node::Node;

/// How long a peer may leave half a request unsent, or an answer unread, with nothing moving.
const STUCK: Duration = Duration::from_secs(30);
/// So often are all connections looked at in that time.
const LOOKS: u32 = 30;
/// Where others wait for memory of requests, a peer gets one part in so many of that time for the rest of its own.
const HURRY_TO_SEND: u32 = 15;
/// The same where others wait for memory of answers, and a peer has its own unread.
const HURRY_TO_READ: u32 = 3;
/// What must move over such a connection, bytes in a second; less is nothing.
const RATE_MIN: u64 = 8 << 10;

/// What is asked of a peer that is waited for.
#[derive(Clone, Copy)]
struct Patience {
    /// How long nothing may move.
    still_max: Duration,
    /// Bytes between two looks that are more than nothing.
    least: u64,
}

impl Patience {
    fn new(stuck_max: Duration, is_wanted: bool, hurry: u32) -> Self {
        let pause = stuck_max / LOOKS;
        match is_wanted {
            true => Self {
                still_max: stuck_max / hurry,
                least: (RATE_MIN as f64 * pause.as_secs_f64()) as u64,
            },
            false => Self {
                still_max: stuck_max,
                least: 1,
            },
        }
    }
}

/// A connection as it was when it last moved.
struct Watched {
    peer: SocketAddr,
    traffic: Weak<Traffic>,
    bytes: u64,
    /// It waited for its peer.
    waits: bool,
    since: Instant,
}

/// The connections of one shard.
#[derive(Default)]
pub struct Connections(RefCell<Vec<Watched>>);

impl Connections {
    /// Watches over a connection for as long as it is there.
    pub fn add(&self, peer: SocketAddr, traffic: &Rc<Traffic>) {
        self.0.borrow_mut().push(Watched {
            peer,
            traffic: Rc::downgrade(traffic),
            bytes: traffic.bytes(),
            waits: false,
            since: Instant::now(),
        });
    }

    /// Closes connections that wait for their peers for too long, to receive or to send, and those over which nothing has moved for
    /// `idle_max`.
    fn look(&self, now: Instant, to_receive: Patience, to_send: Patience, idle_max: Option<Duration>) {
        self.0.borrow_mut().retain_mut(|watched| {
            let Some(traffic) = watched.traffic.upgrade() else {
                return false;
            };
            let (receives, sends) = (traffic.receives(), traffic.sends());
            let waits = receives || sends;
            let patience = if receives && !sends { to_receive } else { to_send };
            let moved = traffic.bytes().wrapping_sub(watched.bytes);
            let begins = waits && !watched.waits;
            (watched.bytes, watched.waits) = (traffic.bytes(), waits);
            if begins || moved >= if waits { patience.least } else { 1 } {
                watched.since = now;
                return true;
            }
            let still = now.duration_since(watched.since);
            if waits && still >= patience.still_max {
                tracing::warn!(peer = %watched.peer, still_s = still.as_secs(),
                    "a connection was closed: its peer sent the rest of a request, or read its answer, too slowly or not at all");
            } else if idle_max.is_some_and(|max| still >= max) {
                tracing::debug!(peer = %watched.peer, "a connection was closed: connections.max.idle.ms is reached");
            } else {
                return true;
            }
            traffic.cut();
            false
        });
    }
}

fn idle_max(node: &Node) -> Option<Duration> {
    let ms = u64::try_from(node.shared.settings.number("connections.max.idle.ms")).ok()?;
    Some(Duration::from_millis(ms))
}

/// The longest that a request may wait for something to happen: a peer that is gone is noticed by the answer to it, and one that waits
/// is not idle.
#[must_use]
pub fn wait_max(node: &Node) -> Duration {
    idle_max(node).map_or(Duration::MAX, |max| max / 2)
}

/// Closes idle connections of this shard until it stops.
pub async fn watch(node: &Node) {
    let idle_max = idle_max(node);
    let stuck_max = idle_max.map_or(STUCK, |max| max.min(STUCK));
    while !node.is_stopping() {
        node.host_sleep(stuck_max / LOOKS).await;
        let to_receive = Patience::new(stuck_max, node.requests.is_waited_for(), HURRY_TO_SEND);
        let to_send = Patience::new(stuck_max, node.answers.is_waited_for(), HURRY_TO_READ);
        node.connections.look(Instant::now(), to_receive, to_send, idle_max);
    }
}
