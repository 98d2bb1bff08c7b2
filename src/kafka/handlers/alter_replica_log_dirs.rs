//! AlterReplicaLogDirs, versions 1 to 2 (KIP-113): partitions go to other cores of this broker. Each core is a log directory of its
//! own to tools, as [`core_dir`] names it; all are in the one data folder. As in Kafka the answer says that the moves are wanted;
//! DescribeLogDirs shows them as future replicas until they are made.

use std::rc::Rc;

use kafka_protocol::{
    ResponseError,
    messages::{
        AlterReplicaLogDirsRequest, AlterReplicaLogDirsResponse,
        alter_replica_log_dirs_response::{AlterReplicaLogDirPartitionResult, AlterReplicaLogDirTopicResult},
    },
};
use millrace_engine::PartitionKey;

use crate::{
    coordinator::moves,
    kafka::{core_dirs::core_dir, errors::Failure},
    node::Node,
};

/// Handles a request.
pub async fn handle(node: &Rc<Node>, request: AlterReplicaLogDirsRequest) -> AlterReplicaLogDirsResponse {
    let cores = node.router.shards();
    let data = &node.shared.data_dir;
    let mut wanted = Vec::new();
    let mut results = Vec::new();
    for dir in request.dirs {
        let core = (0..cores).find(|core| core_dir(data, *core, cores) == dir.path.as_str());
        for topic in dir.topics {
            let id = node.view().image.topic(&topic.name).map(|t| t.id);
            let checked = topic.partitions.into_iter().map(|index| {
                let want = || {
                    let to = core.ok_or(Failure::from(ResponseError::LogDirNotFound))?;
                    let partition = u32::try_from(index).map_err(|_| Failure::unknown_partition())?;
                    let topic = id.ok_or_else(Failure::unknown_partition)?;
                    let key = PartitionKey { topic, partition };
                    moves::check(node, &key, to)?;
                    Ok::<_, Failure>((key, to))
                };
                let code = match want() {
                    Ok(move_to) => {
                        wanted.push(move_to);
                        0
                    }
                    Err(failure) => failure.code(),
                };
                AlterReplicaLogDirPartitionResult::default()
                    .with_partition_index(index)
                    .with_error_code(code)
            });
            results.push(
                AlterReplicaLogDirTopicResult::default()
                    .with_topic_name(topic.name)
                    .with_partitions(checked.collect()),
            );
        }
    }
    let noted = node.router.call(node, 0, move |n| async move {
        let coordinator = n.coordinator();
        wanted.into_iter().for_each(|(key, to)| coordinator.moves.want(key, to));
    });
    if noted.await.is_err() {
        let failed = results.iter_mut().flat_map(|t| &mut t.partitions);
        failed.for_each(|p| p.error_code = ResponseError::NotController.code());
    }
    AlterReplicaLogDirsResponse::default().with_results(results)
}
