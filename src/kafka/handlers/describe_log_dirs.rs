//! DescribeLogDirs, versions 1 to 5: each core's partitions as a folder of its own ([`core_dir`]), sizes of segments, room on the
//! disk (KIP-827), which all cores share. Partitions that are to go to another core are future replicas there (KIP-113).

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    rc::Rc,
};

use kafka_protocol::{
    messages::{
        DescribeLogDirsRequest, DescribeLogDirsResponse,
        describe_log_dirs_response::{DescribeLogDirsPartition, DescribeLogDirsResult, DescribeLogDirsTopic},
    },
    protocol::StrBytes,
};
use millrace_engine::{PartitionKey, host::Host};

use crate::{
    kafka::{connection::Peer, core_dirs::core_dir},
    node::Node,
    router::scatter,
};

type Topics = BTreeMap<String, Vec<DescribeLogDirsPartition>>;

/// Handles a request.
pub async fn handle(
    node: &Rc<Node>,
    version: i16,
    peer: &Peer,
    request: DescribeLogDirsRequest,
) -> DescribeLogDirsResponse {
    let view = node.view();
    // Topic → partitions, none of which means all.
    let mut asked: HashMap<&str, HashSet<i32>> = HashMap::new();
    for topic in request.topics.iter().flatten() {
        asked.entry(&topic.topic).or_default().extend(&topic.partitions);
    }
    let wanted = |topic: &str, partition: i32| {
        request.topics.is_none() || (asked.get(topic)).is_some_and(|some| some.is_empty() || some.contains(&partition))
    };
    let cores = node.router.shards();
    let shown = |core: usize| !peer.to_core || core == node.shard;
    // Name, index, core and key of each.
    let mut found: Vec<(&str, i32, usize, PartitionKey)> = Vec::new();
    for topic in view.image.topics() {
        for partition in 0..topic.partitions.len() as u32 {
            let key = PartitionKey {
                topic: topic.id,
                partition,
            };
            if wanted(&topic.name, partition as i32)
                && let Some(core) = view.placement.get(&key)
            {
                found.push((&topic.name, partition as i32, *core as usize, key));
            }
        }
    }
    let keys: Vec<PartitionKey> = found.iter().map(|(.., key)| *key).collect();
    let targets = node.router.call(node, 0, move |n| async move {
        let coordinator = n.coordinator();
        keys.iter().map(|k| coordinator.moves.target(k)).collect::<Vec<_>>()
    });
    let targets = targets.await.unwrap_or_default();
    let work = found.iter().map(|(_, _, core, key)| (*core, *key)).collect();
    let sizes = scatter(node, work, |n, keys| async move {
        keys.iter()
            .map(|k| n.engine.partition(k).map_or(0, |p| p.size_bytes() as i64))
            .collect()
    })
    .await;
    let mut dirs: Vec<Topics> = (0..cores).map(|_| Topics::new()).collect();
    for (at, ((name, partition, home, _), size)) in found.into_iter().zip(sizes).enumerate() {
        let mut show = |core: usize, future: bool| {
            dirs[core].entry(name.to_owned()).or_default().push(
                DescribeLogDirsPartition::default()
                    .with_partition_index(partition)
                    .with_partition_size(*size.as_ref().unwrap_or(&0))
                    .with_is_future_key(future),
            );
        };
        show(home, false);
        if let Some(target) = targets.get(at).copied().flatten().filter(|t| *t != home) {
            show(target, true);
        }
    }
    let space = |r: std::io::Result<u64>| r.map_or(-1, |n| n as i64);
    let data = &node.shared.data_dir;
    let room = (version >= 4).then(|| (space(node.host.free_space(data)), space(node.host.total_space(data))));
    let results = dirs.into_iter().enumerate().filter(|(core, _)| shown(*core));
    let results = results.map(|(core, topics)| {
        let mut result = DescribeLogDirsResult::default()
            .with_log_dir(StrBytes::from_string(core_dir(data, core, cores)))
            .with_topics(topics.into_iter().map(topic).collect());
        if let Some((usable, total)) = room {
            (result.usable_bytes, result.total_bytes) = (usable, total);
        }
        result
    });
    DescribeLogDirsResponse::default().with_results(results.collect())
}

fn topic((name, partitions): (String, Vec<DescribeLogDirsPartition>)) -> DescribeLogDirsTopic {
    DescribeLogDirsTopic::default()
        .with_name(StrBytes::from_string(name).into())
        .with_partitions(partitions)
}
