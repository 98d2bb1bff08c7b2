//! Spreads the work of this node's partitions over its cores: where one core has lasting more to do than another, a partition goes.

use std::{rc::Rc, time::Duration};

use millrace_cluster::cores::{Load, relief};
use millrace_engine::{PartitionMap, shard::Partition};

use crate::{
    node::{Node, OFFSETS_TOPIC},
    replication::after,
};

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
    let mut before: PartitionMap<u64> = PartitionMap::default();
    let mut wish = None;
    loop {
        after(node, pause, &node.stop, || node.is_stop_wanted()).await;
        if node.is_stop_wanted() {
            return;
        }
        let totals = totals(node).await;
        let since = |total: &Load| {
            // It counts from zero on a new core.
            let before = before.get(&total.key).filter(|b| **b <= total.work);
            let work = total.work - before.unwrap_or(&0);
            Load { work, ..*total }
        };
        let loads: Vec<Load> = totals.iter().map(since).collect();
        before = totals.iter().map(|total| (total.key, total.work)).collect();
        let wanted = relief(&loads, cores, ENOUGH * pause.as_secs());
        let from = |key| loads.iter().find(|l| l.key == key).map(|l| l.core);
        let lane = wanted.map(|(key, to)| (from(key), to));
        // Twice in a row: what passes by itself is not worth the moment in which its clients wait.
        wish = match wanted {
            Some((key, to)) if lane == wish && coordinator.moves.is_idle() => {
                tracing::info!(partition = %key, to, "a core has more to do than another: a partition goes there");
                coordinator.moves.want(key, to);
                None
            }
            _ => lane,
        };
    }
}

/// The work of each partition so far.
async fn totals(node: &Rc<Node>) -> Vec<Load> {
    let mut all = Vec::new();
    for core in 0..node.router.shards() {
        let here = node.router.call(node, core, move |n| async move {
            let view = n.view();
            let load = |p: Rc<Partition>| {
                let topic = view.image.topic_by_id(&p.key.topic);
                view.placement.contains_key(&p.key).then(|| Load {
                    key: p.key,
                    core,
                    work: p.work(),
                    movable: topic.is_some_and(|t| t.name != OFFSETS_TOPIC),
                })
            };
            n.engine.partitions().into_iter().filter_map(load).collect::<Vec<_>>()
        });
        all.extend(here.await.unwrap_or_default());
    }
    all
}
