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
/// So often are all connections looked at in that time. Where others wait for memory, the time between two looks is all that a peer gets.
const LOOKS: u32 = 6;

/// A connection as it was when it last moved.
struct Watched {
    peer: SocketAddr,
    traffic: Weak<Traffic>,
    bytes: u64,
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
            since: Instant::now(),
        });
    }

    fn look(&self, now: Instant, stuck_max: Duration, idle_max: Option<Duration>) {
        self.0.borrow_mut().retain_mut(|watched| {
            let Some(traffic) = watched.traffic.upgrade() else {
                return false;
            };
            if traffic.bytes() != watched.bytes {
                watched.bytes = traffic.bytes();
                watched.since = now;
                return true;
            }
            let still = now.duration_since(watched.since);
            if traffic.waits_for_peer() && still >= stuck_max {
                tracing::warn!(peer = %watched.peer, still_s = still.as_secs(),
                    "a connection was closed: its peer neither sent the rest of a request nor read its answer");
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
        let wanted = node.requests.is_waited_for() || node.answers.is_waited_for();
        let stuck_max = if wanted { stuck_max / LOOKS } else { stuck_max };
        node.connections.look(Instant::now(), stuck_max, idle_max);
    }
}
