//! DescribeLogDirs, versions 1 to 5: one folder, sizes of segments, room on the disk (KIP-827).

use std::{collections::BTreeMap, rc::Rc};

use kafka_protocol::{
    messages::{
        DescribeLogDirsRequest, DescribeLogDirsResponse,
        describe_log_dirs_response::{DescribeLogDirsPartition, DescribeLogDirsResult, DescribeLogDirsTopic},
    },
    protocol::StrBytes,
};
use millrace_engine::{PartitionKey, host::Host};

use crate::{kafka::connection::Peer, node::Node, router::scatter};

/// Handles a request.
pub async fn handle(
    node: &Rc<Node>,
    version: i16,
    peer: &Peer,
    request: DescribeLogDirsRequest,
) -> DescribeLogDirsResponse {
    let view = node.view();
    let wanted = |topic: &str, partition: i32| match &request.topics {
        None => true,
        Some(topics) => topics
            .iter()
            .any(|t| t.topic.as_str() == topic && (t.partitions.is_empty() || t.partitions.contains(&partition))),
    };
    let mut work: Vec<(usize, PartitionKey)> = Vec::new();
    let mut names = Vec::new();
    for topic in view.image.topics() {
        for partition in 0..topic.partitions.len() as u32 {
            let key = PartitionKey {
                topic: topic.id,
                partition,
            };
            if wanted(&topic.name, partition as i32)
                && let Some(shard) = view.placement.get(&key).map(|s| *s as usize)
                && (!peer.to_core || shard == node.shard)
            {
                work.push((shard, key));
                names.push((topic.name.clone(), partition as i32));
            }
        }
    }
    let sizes = scatter(node, work, |n, keys| async move {
        keys.iter()
            .map(|k| n.engine.partition(k).map_or(0, |p| p.status().size_bytes as i64))
            .collect()
    })
    .await;
    let mut topics: BTreeMap<String, Vec<DescribeLogDirsPartition>> = BTreeMap::new();
    for ((name, partition), size) in names.into_iter().zip(sizes) {
        topics.entry(name).or_default().push(
            DescribeLogDirsPartition::default()
                .with_partition_index(partition)
                .with_partition_size(size.unwrap_or(0)),
        );
    }
    let mut result = DescribeLogDirsResult::default()
        .with_log_dir(StrBytes::from_string(node.shared.data_dir.display().to_string()))
        .with_topics(
            topics
                .into_iter()
                .map(|(name, partitions)| {
                    DescribeLogDirsTopic::default()
                        .with_name(StrBytes::from_string(name).into())
                        .with_partitions(partitions)
                })
                .collect(),
        );
    if version >= 4 {
        let space = |r: std::io::Result<u64>| r.map_or(-1, |n| n as i64);
        result.usable_bytes = space(node.host.free_space(&node.shared.data_dir));
        result.total_bytes = space(node.host.total_space(&node.shared.data_dir));
    }
    DescribeLogDirsResponse::default().with_results(vec![result])
}
