//! How fast followers that catch up are sent what they lack (`leader.replication.throttled.rate`).

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use millrace_cluster::metadata::ConfigResource;

use crate::node::Node;

/// Kafka's name of the setting.
const RATE: &str = "leader.replication.throttled.rate";

/// Paces one shard: what was sent says when more may be.
#[derive(Debug)]
pub struct Throttle {
    next: Cell<Instant>,
}

impl Default for Throttle {
    fn default() -> Self {
        Self {
            next: Cell::new(Instant::now()),
        }
    }
}

impl Throttle {
    /// How long to wait before anything is sent; `None` for not at all.
    #[must_use]
    pub fn wait(&self) -> Option<Duration> {
        Some(self.next.get().saturating_duration_since(Instant::now())).filter(|d| !d.is_zero())
    }

    /// Takes note of bytes sent now, at a rate in bytes a second.
    pub fn sent(&self, bytes: usize, rate: u64) {
        let time = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        self.next.set(self.next.get().max(Instant::now()) + time);
    }
}

/// The rate that this shard has to keep to, if any: its part of the broker's.
#[must_use]
pub fn rate(node: &Node) -> Option<u64> {
    let view = node.view();
    let own = ConfigResource::Broker(Some(node.shared.node_id));
    let set = view.image.config(&own, RATE);
    let set = set.or_else(|| view.image.config(&ConfigResource::Broker(None), RATE));
    let rate: u64 = set.unwrap_or(node.shared.settings.get(RATE)).parse().ok()?;
    (rate < i64::MAX as u64).then(|| (rate / node.router.shards() as u64).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sent_says_when_more_may_be() {
        let throttle = Throttle::default();
        assert!(throttle.wait().is_none());
        throttle.sent(1_000, 100);
        let wait = throttle.wait().expect("ten seconds' worth was sent");
        assert!(
            wait > Duration::from_secs(9) && wait <= Duration::from_secs(10),
            "{wait:?}"
        );
        throttle.sent(1_000, 100);
        assert!(throttle.wait().expect("twice that") > Duration::from_secs(19));
    }
}
