//! Spreads the work of this node's partitions over its cores: where one core has lasting more to do than another, a partition goes.

use std::{rc::Rc, time::Duration};

use millrace_cluster::cores::{Load, relief};
use millrace_engine::{PartitionKey, PartitionMap};

use crate::node::{Node, OFFSETS_TOPIC};

/// Work a second below which no core is relieved: what takes it some percent of its time. In bytes, as the engine counts
/// work (`Partition::work`).
const ENOUGH: u64 = 16 << 20;

/// Looks at the work of all partitions now and then, and asks for one move at a time, as long as the node runs.
pub async fn run(node: &Rc<Node>) {
    let settings = &node.shared.settings;
    let pause = Duration::from_secs(settings.number("core.imbalance.check.interval.seconds") as u64);
    let cores = node.router.shards();
    if cores == 1 || !settings.flag("auto.core.rebalance.enable") {
        return;
    }
    let coordinator = node.coordinator();
    let mut before = PartitionMap::default();
    let mut wish = None;
    loop {
        let stop = async {
            node.stop.wait(|| node.is_stop_wanted().then_some(())).await;
            true
        };
        let rest = async {
            node.host_sleep(pause).await;
            false
        };
        if futures_lite::future::or(stop, rest).await {
            return;
        }
        let work = work(node).await;
        let loads: Vec<Load> = (work.iter())
            .map(|(key, (core, work, movable))| Load {
                key: *key,
                core: *core,
                // It counts from zero on a new core.
                work: work - before.get(key).filter(|b| *b <= work).unwrap_or(&0),
                movable: *movable,
            })
            .collect();
        before = work.into_iter().map(|(key, (_, work, _))| (key, work)).collect();
        let wanted = relief(&loads, cores, ENOUGH * pause.as_secs());
        // Twice in a row: what passes by itself is not worth the moment in which its clients wait.
        let from = |key| loads.iter().find(|l| l.key == key).map(|l| l.core);
        let lasting = wanted.and_then(|(key, to)| Some((from(key)?, to)));
        if let (Some((key, to)), true) = (
            wanted,
            lasting.is_some() && lasting == wish && coordinator.moves.is_idle(),
        ) {
            tracing::info!(partition = %key, to, "a core has more to do than another: a partition goes there");
            coordinator.moves.want(key, to);
            wish = None;
        } else {
            wish = lasting;
        }
    }
}

/// Core and work so far of each partition, and whether it may go to another core.
async fn work(node: &Rc<Node>) -> PartitionMap<(usize, u64, bool)> {
    let mut all = PartitionMap::default();
    for core in 0..node.router.shards() {
        let here = node.router.call(node, core, |n| async move {
            let view = n.view();
            let is_placed = |key: &PartitionKey| view.placement.contains_key(key);
            let movable =
                |key: &PartitionKey| (view.image.topic_by_id(&key.topic)).is_some_and(|t| t.name != OFFSETS_TOPIC);
            let partitions = n.engine.partitions().into_iter().filter(|p| is_placed(&p.key));
            partitions
                .map(|p| (p.key, p.work(), movable(&p.key)))
                .collect::<Vec<_>>()
        });
        for (key, work, movable) in here.await.unwrap_or_default() {
            all.insert(key, (core, work, movable));
        }
    }
    all
}
