//! Driver of the controller: one change at a time is decided on the latest image, committed to the metadata log, and
//! handed to every shard before it is answered. A quorum of one; a Raft log takes the place of this log.

use std::{cell::Cell, collections::HashMap, rc::Rc, sync::Arc};

use bytes::Bytes;
use millrace_cluster::{
    controller::topics::Defaults,
    metadata::{Image, MetadataRecord, record},
};
use millrace_engine::{
    AppendError, PartitionKey, PartitionMap, ReadError, StorageError,
    batch::PayloadFormat,
    host::Host,
    log::{LogConfig, LogState},
    shard::Shard,
    sync::Budget,
};
use thiserror::Error;

use crate::{
    kafka::errors::Failure,
    node::{METADATA_KEY, Node, OFFSETS_TOPIC, View},
    router::Stopping,
};

/// Bytes of metadata log after which the image is written as a snapshot and what lies before is cut.
const SNAPSHOT_BYTES: u64 = 8 << 20;

/// The metadata log failed.
#[derive(Debug, Error)]
pub enum MetadataError {
    /// An append failed.
    #[error("the metadata log takes no change: {0}")]
    Append(#[from] AppendError),
    /// It cannot be read.
    #[error("the metadata log cannot be read: {0}")]
    Read(#[from] ReadError),
    /// A flush failed.
    #[error("the metadata log takes no change: {0}")]
    Storage(#[from] StorageError),
    /// A record does not decode.
    #[error(transparent)]
    Decode(#[from] record::DecodeError),
    /// The broker is stopping.
    #[error(transparent)]
    Stopping(#[from] Stopping),
}

/// The controller of a node.
pub struct ControllerDriver {
    turn: Rc<Budget>,
    snapshot_at: Cell<u64>,
}

impl Default for ControllerDriver {
    fn default() -> Self {
        Self {
            turn: Budget::new(1),
            snapshot_at: Cell::new(SNAPSHOT_BYTES),
        }
    }
}

impl ControllerDriver {
    /// Decides a change on the latest image and commits it; `decide` returns its records and its answer.
    ///
    /// # Errors
    /// [`MetadataError`]; the change may then be found after a restart, or not.
    pub async fn change<T>(
        &self,
        node: &Rc<Node>,
        decide: impl FnOnce(&Image) -> (Vec<MetadataRecord>, T),
    ) -> Result<T, MetadataError> {
        let _turn = self.turn.acquire(1).await;
        let view = node.view();
        let (records, answer) = decide(&view.image);
        if records.is_empty() {
            return Ok(answer);
        }
        commit(&node.engine, &records).await?;
        let image = view.image.apply(&records);
        let placement = place(&image, &view.placement, node.router.shards());
        let removed: Vec<String> = view
            .image
            .topics()
            .filter(|t| image.topic_by_id(&t.id).is_none())
            .map(|t| t.name.clone())
            .collect();
        let view = Arc::new(View { image, placement });
        let for_all = Arc::clone(&view);
        node.router
            .broadcast(node, move |n| {
                let view = Arc::clone(&for_all);
                async move { n.install(view, HashMap::new()) }
            })
            .await?;
        if !removed.is_empty() {
            // Not waited for: the groups may themselves be waiting for a change of the metadata.
            let n = Rc::clone(node);
            node.host.spawn(async move {
                for topic in removed {
                    n.coordinator().groups.topic_deleted(&n, &topic).await;
                }
            });
        }
        self.snapshot(node, &view.image).await?;
        Ok(answer)
    }

    async fn snapshot(&self, node: &Rc<Node>, image: &Image) -> Result<(), MetadataError> {
        let Some(log) = node.engine.partition(&METADATA_KEY) else {
            return Ok(());
        };
        let size = log.status().size_bytes;
        if size < self.snapshot_at.get() {
            return Ok(());
        }
        let start = commit(&node.engine, &image.snapshot()).await?;
        node.engine.delete_records(&log, start).await?;
        self.snapshot_at.set(log.status().size_bytes + SNAPSHOT_BYTES);
        Ok(())
    }
}

/// Proposes a change from any shard; with `validate_only` it is decided and nothing is committed.
///
/// # Errors
/// What `decide` says, or the metadata log's failure.
pub async fn propose<F>(node: &Rc<Node>, validate_only: bool, decide: F) -> Result<(), Failure>
where
    F: FnOnce(&Node, &Image) -> Result<Vec<MetadataRecord>, Failure> + Send + 'static,
{
    node.router
        .call(node, 0, move |n| async move {
            n.coordinator()
                .controller
                .change(&n, |image| match decide(&n, image) {
                    Ok(_) if validate_only => (Vec::new(), Ok(())),
                    Ok(records) => (records, Ok(())),
                    Err(failure) => (Vec::new(), Err(failure)),
                })
                .await?
        })
        .await?
}

/// Appends records as one batch, durably; returns its offset.
async fn commit<H: Host>(engine: &Shard<H>, records: &Vec<MetadataRecord>) -> Result<i64, MetadataError> {
    let payload = Bytes::from(record::encode(records));
    let permit = engine.admit(payload.len()).await;
    let appended = engine.append_metadata(METADATA_KEY, 0, payload, permit)?;
    if let Some(log) = engine.partition(&METADATA_KEY) {
        log.wait_high_watermark(appended.end_offset).await?;
    }
    Ok(appended.base_offset)
}

/// Reads the metadata log into an image, and notes this start of the broker in it.
///
/// # Errors
/// [`MetadataError`].
pub async fn load<H: Host>(
    engine: &Shard<H>,
    recovered: Option<LogState>,
    node_id: i32,
) -> Result<Image, MetadataError> {
    let config = LogConfig {
        segment_bytes: 4 << 20,
        retention_ms: -1,
        ..LogConfig::default()
    };
    engine.add_partition(recovered.unwrap_or_else(|| LogState::new(METADATA_KEY)), config);
    let mut image = Image::default();
    if let Some(log) = engine.partition(&METADATA_KEY) {
        let mut payloads = Vec::new();
        engine
            .visit(METADATA_KEY, log.status().log_start, |batch| {
                if batch.header.format == PayloadFormat::Metadata {
                    payloads.push(batch.payload.clone());
                }
                true
            })
            .await?;
        for payload in payloads {
            image = image.apply(&record::decode(&payload)?);
        }
    }
    let started = vec![MetadataRecord::BrokerStarted { node: node_id }];
    commit(engine, &started).await?;
    Ok(image.apply(&started))
}

/// Partition → shard: those placed stay, new ones go to the shard with the fewest. The coordinator's topic is on
/// shard 0, where the coordinator is.
#[must_use]
pub fn place(image: &Image, placed: &PartitionMap<u32>, shards: usize) -> PartitionMap<u32> {
    let mut load = vec![0_usize; shards];
    let mut placement = PartitionMap::with_capacity_and_hasher(placed.len(), Default::default());
    let mut new = Vec::new();
    for topic in image.topics() {
        for partition in 0..topic.partitions.len() as u32 {
            let key = PartitionKey {
                topic: topic.id,
                partition,
            };
            if topic.name == OFFSETS_TOPIC {
                placement.insert(key, 0);
            } else if let Some(shard) = placed.get(&key).filter(|s| (**s as usize) < shards) {
                placement.insert(key, *shard);
                load[*shard as usize] += 1;
            } else {
                new.push(key);
            }
        }
    }
    for key in new {
        let shard = (0..shards).min_by_key(|s| load[*s]).unwrap_or(0);
        load[shard] += 1;
        placement.insert(key, shard as u32);
    }
    placement
}

/// What new topics get where a request leaves it open.
#[must_use]
pub fn defaults(node: &Node) -> Defaults {
    let settings = &node.shared.settings;
    Defaults {
        brokers: vec![node.shared.node_id],
        partitions: settings.number("num.partitions") as i32,
        replication_factor: settings.number("default.replication.factor") as i16,
    }
}
