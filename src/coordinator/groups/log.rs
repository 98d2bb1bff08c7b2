//! What groups are in the log of `__consumer_offsets`: read when this node begins to lead a partition, appended to by commits and by
//! what the state machine asks for, and written anew where it has become long.
//!
//! The log has to say the same as the state in memory, which the next coordinator does not have: so its order is the order in which the
//! state changes. Whoever appends has the turn until it has; a commit, of which the state knows only when it is durable, keeps one of
//! [`APPENDS`] until then; and what removes offsets, or copies the state, takes the turn first and then all of them.

use std::{rc::Rc, sync::Arc};

use bytes::Bytes;
use millrace_cluster::{
    controller::topics::{self, NewTopic},
    group::{GroupError, coordinator::Caller, offsets::Committed, records},
    metadata::ConfigResource,
};
use millrace_engine::{
    PartitionKey,
    kafka_batch::{self, BATCH_HEADER_LEN, NewRecord},
    shard::Partition,
};
use uuid::Uuid;

use super::{APPENDS, GroupsDriver, partition_of};
use crate::{
    config::Known,
    coordinator::controller,
    kafka::errors::Failure,
    node::{Node, OFFSETS_TOPIC, View, topic_setting},
    replication::Slot,
};

/// Bytes of a coordinator partition's log after which its state is written anew and what lies before is cut. This
/// bounds disk use and load time until the topic is compacted.
const SNAPSHOT_BYTES: u64 = 16 << 20;
/// Bytes of records in one batch of a snapshot.
const SNAPSHOT_BATCH_BYTES: usize = 256 << 10;

/// Bytes of a commit's record beside names and metadata: numbers, lengths, and the record's own head.
const RECORD_BYTES: usize = 48;

/// Bytes of records in one batch of a commit, as in Kafka: what the topic takes.
fn batch_bytes_max(node: &Node) -> usize {
    let view = node.view();
    let topic = ConfigResource::Topic(OFFSETS_TOPIC.into());
    let value = topic_setting(&node.shared.settings, &view.image, &topic, "max.message.bytes");
    value.parse().unwrap_or(0)
}

/// A group's partition, and the epoch of this node's leadership under which it was loaded.
pub(super) type Place = (PartitionKey, i32);

/// What was appended, and is not yet held by all in sync.
struct Appended {
    slot: Rc<Slot>,
    epoch: i32,
    base: i64,
    end: i64,
}

impl Appended {
    async fn acknowledged(&self) -> Result<(), Failure> {
        self.slot.wait_acknowledged(self.epoch, self.end, true, 1).await
    }
}

/// Offsets to be committed, and the metadata by which their topics were found.
pub struct Commit {
    /// Topic, partition, offset.
    pub offsets: Vec<(String, i32, Committed)>,
    /// The metadata.
    pub found_in: Arc<View>,
}

impl Commit {
    /// Whether its topics are still there: what was committed for a topic that is gone was forgotten when it went, and is not to be
    /// taken for an offset of another by that name.
    fn still_holds(&self, view: &View) -> bool {
        let id = |view: &View, name: &str| view.image.topic(name).map(|topic| topic.id);
        self.offsets
            .iter()
            .all(|(topic, _, _)| id(view, topic) == id(&self.found_in, topic))
    }
}

impl GroupsDriver {
    /// Reads the groups of a partition that this node leads from its log, once it is known what of it the replicas hold.
    pub(super) async fn load(
        &self,
        node: &Rc<Node>,
        key: PartitionKey,
        epoch: i32,
        partitions: usize,
    ) -> Result<(), Failure> {
        let gone = || Failure::from(GroupError::NotCoordinator);
        let slot = node.replication.slot(&key).ok_or_else(gone)?;
        slot.wait_end_known(epoch).await?;
        let now = node.steady_ms();
        let start = slot.partition.status().log_start;
        let mut bytes = 0;
        node.engine
            .visit(key, start, |batch| {
                bytes += batch.payload.len();
                self.load_batch(&batch.payload, now);
                true
            })
            .await?;
        let index = key.partition;
        if self.loaded.borrow().get(&index) != Some(&(epoch, false)) {
            // It was lost again, or won anew, while it was read.
            self.state
                .borrow_mut()
                .unload(|group| partition_of(group, partitions) == index);
            return Err(gone());
        }
        self.state
            .borrow_mut()
            .loaded(|group| partition_of(group, partitions) == index, now);
        self.loaded.borrow_mut().insert(index, (epoch, true));
        self.wake_clock();
        tracing::debug!(
            partition = index,
            epoch,
            bytes,
            ms = node.steady_ms() - now,
            "groups loaded"
        );
        Ok(())
    }

    fn load_batch(&self, payload: &[u8], now: i64) {
        let Ok((info, len)) = kafka_batch::parse(payload) else {
            return;
        };
        let visited = kafka_batch::for_each_record(&payload[BATCH_HEADER_LEN..len], &info, |record| {
            if let Some(decoded) = record.key.and_then(|key| records::decode(key, record.value, now)) {
                self.state.borrow_mut().load(decoded, now);
            }
            true
        });
        if let Err(error) = visited {
            tracing::error!(%error, "a batch of {OFFSETS_TOPIC} does not decode; its commits are missing");
        }
    }

    /// Commits offsets, durably, if the member may do so at the moment they are appended: another generation's would follow them.
    ///
    /// # Errors
    /// [`Failure`].
    pub async fn commit(
        &self,
        node: &Rc<Node>,
        group: &str,
        caller: Caller<'_>,
        commit: Commit,
    ) -> Result<(), Failure> {
        if commit.offsets.is_empty() {
            return Ok(());
        }
        let of_group = RECORD_BYTES + group.len();
        let bytes = (commit.offsets.iter())
            .map(|(topic, _, committed)| of_group + topic.len() + committed.metadata.len())
            .sum::<usize>();
        if bytes > batch_bytes_max(node) {
            return Err(GroupError::CommitTooLarge.into());
        }
        let records: Vec<NewRecord> = (commit.offsets.iter())
            .map(|(topic, partition, committed)| NewRecord {
                key: Some(records::offset_key(group, topic, *partition)),
                value: Some(records::offset_value(committed)),
                timestamp: committed.commit_ms,
            })
            .collect();
        self.ready(node, group, true).await?;
        let turn = self.turn.acquire(1).await;
        // What was removed before is removed in the log before.
        self.carry_out(node, false).await;
        let one = self.appends.acquire(1).await;
        let place = self.place(node, group)?;
        let check = || {
            if self.place(node, group)? != place {
                return Err(GroupError::NotCoordinator);
            }
            if !commit.still_holds(&node.view()) {
                // The client tries again, and is told which topic it is.
                return Err(GroupError::Loading);
            }
            let mut state = self.state.borrow_mut();
            state.check_commit(group, caller, node.steady_ms())
        };
        let appended = self.append_if(node, place, &records, check).await?;
        drop(turn);
        appended.acknowledged().await?;
        // Who has lost the group, and perhaps won it anew, has read it from the log or will.
        if self.place(node, group) == Ok(place) {
            let (mut state, now) = (self.state.borrow_mut(), node.steady_ms());
            for (topic, partition, committed) in commit.offsets {
                state.committed(group, &topic, partition, committed, now);
            }
        }
        drop(one);
        if self.long_log(node, place).is_some() {
            let _turn = self.turn.acquire(1).await;
            self.snapshot_if_due(node, place, false).await;
        }
        Ok(())
    }

    /// Appends what the state machine asks for; whoever calls has the turn, and `alone` says that it has all appends, too.
    pub(super) async fn persist(
        &self,
        node: &Rc<Node>,
        place: Place,
        records: &[NewRecord],
        alone: bool,
    ) -> Result<(), Failure> {
        let appended = self.append_if(node, place, records, || Ok(())).await?;
        appended.acknowledged().await?;
        self.snapshot_if_due(node, place, alone).await;
        Ok(())
    }

    /// Appends what `check` still allows when there is room for it.
    async fn append_if(
        &self,
        node: &Rc<Node>,
        (key, epoch): Place,
        records: &[NewRecord],
        check: impl FnOnce() -> Result<(), GroupError>,
    ) -> Result<Appended, Failure> {
        let payload = kafka_batch::build(records, (-1, -1, -1));
        let (info, _) = kafka_batch::parse(&payload).map_err(millrace_engine::AppendError::Batch)?;
        let permit = node.engine.admit(payload.len()).await;
        let slot = node.replication.slot(&key).ok_or_else(Failure::not_leader)?;
        slot.check_leads(epoch)?;
        check()?;
        let appended = node.engine.append(key, epoch, vec![(info, payload)], permit)?;
        Ok(Appended {
            slot,
            epoch,
            base: appended.base_offset,
            end: appended.end_offset,
        })
    }

    /// The log of a coordinator's partition, if it has become so long that the state is to be written anew.
    fn long_log(&self, node: &Node, (key, _): Place) -> Option<Rc<Partition>> {
        let log = node.engine.partition(&key)?;
        let due = *self.snapshot_at.borrow().get(&key.partition).unwrap_or(&SNAPSHOT_BYTES);
        (log.size_bytes() >= due).then_some(log)
    }

    async fn snapshot_if_due(&self, node: &Rc<Node>, place: Place, alone: bool) {
        let Some(log) = self.long_log(node, place) else {
            return;
        };
        let _all = match alone {
            true => None,
            false => Some(self.appends.acquire(APPENDS).await),
        };
        if let Err(failure) = self.snapshot(node, place, &log).await {
            tracing::warn!(
                partition = place.0.partition,
                error = failure.message,
                "the log of groups could not be shortened; it is tried again when it has grown"
            );
        }
        let due = log.size_bytes() + SNAPSHOT_BYTES;
        self.snapshot_at.borrow_mut().insert(place.0.partition, due);
    }

    /// Writes the state anew, and cuts what lies before.
    async fn snapshot(&self, node: &Rc<Node>, place: Place, log: &Rc<Partition>) -> Result<(), Failure> {
        let (key, _) = place;
        let partitions = node.view().image.topic(OFFSETS_TOPIC).map_or(1, |t| t.partitions.len());
        let now = node.steady_ms();
        let state: Vec<NewRecord> = self
            .state
            .borrow()
            .snapshot(|group| partition_of(group, partitions) == key.partition)
            .into_iter()
            .map(|(k, value)| NewRecord {
                key: Some(k),
                value,
                timestamp: now,
            })
            .collect();
        let (mut first, mut last) = (None, None);
        let mut rest = state.as_slice();
        while !rest.is_empty() {
            let mut bytes = 0;
            let take = rest
                .iter()
                .take_while(|r| {
                    bytes += r.key.as_ref().map_or(0, Bytes::len) + r.value.as_ref().map_or(0, Bytes::len) + 32;
                    bytes <= SNAPSHOT_BATCH_BYTES
                })
                .count()
                .max(1);
            let (batch, after) = rest.split_at(take);
            let appended = self.append_if(node, place, batch, || Ok(())).await?;
            first.get_or_insert(appended.base);
            last = Some(appended);
            rest = after;
        }
        if let (Some(first), Some(last)) = (first, last) {
            last.acknowledged().await?;
            node.engine.delete_records(log, first).await?;
        }
        Ok(())
    }

    /// Makes `__consumer_offsets` if it is not there.
    ///
    /// # Errors
    /// [`Failure`].
    pub async fn create_topic(&self, node: &Rc<Node>) -> Result<(), Failure> {
        let _turn = self.creating.acquire(1).await;
        let topic = NewTopic {
            name: OFFSETS_TOPIC.into(),
            partitions: node.shared.settings.number("offsets.topic.num.partitions") as i32,
            replication_factor: 1,
            assignments: Vec::new(),
            configs: vec![(
                "segment.bytes".into(),
                Some(node.shared.settings.number("offsets.topic.segment.bytes").to_string()),
            )],
        };
        let wanted = node.shared.settings.number("offsets.topic.replication.factor") as i16;
        node.coordinator()
            .controller
            .change(node, |image| {
                if image.topic(OFFSETS_TOPIC).is_some() {
                    return (Vec::new(), Ok(()));
                }
                let defaults = controller::defaults(node, image);
                let topic = NewTopic {
                    // A small cluster has fewer brokers than that.
                    replication_factor: wanted.min(defaults.brokers.len() as i16),
                    ..topic.clone()
                };
                match topics::create(image, &defaults, &Known, &topic, Uuid::new_v4()) {
                    Ok(records) => (records, Ok(())),
                    Err(error) => (Vec::new(), Err(Failure::from(error))),
                }
            })
            .await?
    }
}
