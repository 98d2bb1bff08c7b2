//! One shard of the broker: its storage, its view of the cluster, and the operations that run where a partition lives.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeSet, HashMap},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use millrace_cluster::metadata::{ConfigResource, Image, PartitionImage, TopicImage};
use millrace_engine::{
    PartitionKey, PartitionMap,
    disk::glommio::GlommioHost,
    host::Host,
    log::{LogConfig, LogState},
    shard::Shard,
    sync::{Budget, WaitList},
};
use millrace_net::{kafka::compression::Unpackers, quic::Endpoint};
use uuid::Uuid;

use crate::{
    config::{Settings, find_topic},
    coordinator::{controller::ControllerDriver, groups::GroupsDriver, moves::Moves},
    endpoints::{Departures, Endpoints},
    kafka::{
        check::KnownRules, errors::Failure, handlers::init_producer_id::ProducerIds, hangups::Hangups,
        idle::Connections, intake::Intake, sessions::Sessions,
    },
    peers::{Members, contacts::Contacts},
    replication::{self, Replication},
    router::Router,
    seldom::Seldom,
};

/// Name of the topic that holds committed offsets.
pub const OFFSETS_TOPIC: &str = "__consumer_offsets";
/// Id of the metadata log, Kafka's own for `__cluster_metadata`.
pub const METADATA_TOPIC_ID: Uuid = Uuid::from_u128(1);
/// The metadata log.
pub const METADATA_KEY: PartitionKey = PartitionKey {
    topic: METADATA_TOPIC_ID,
    partition: 0,
};

/// What all shards know and none changes, but for two counters.
#[derive(Debug)]
pub struct Shared {
    /// Broker settings.
    pub settings: Settings,
    /// The cluster id in the data folder; what a new cluster is called if this node leads it first.
    pub own_cluster_id: String,
    /// Who the cluster begins with.
    pub members: Members,
    /// The data folder was made by this start, or has not seen its cluster yet.
    pub folder_is_new: bool,
    /// This broker.
    pub node_id: i32,
    /// Identity of the data folder (KIP-858).
    pub directory_id: Uuid,
    /// Data folder, for DescribeLogDirs.
    pub data_dir: std::path::PathBuf,
    /// Open connections of all shards.
    pub connections: AtomicUsize,
    /// How many there may be: `max.connections`, or fewer where the host allows fewer files.
    pub connections_max: usize,
    /// Says which of them have hung up.
    pub hangups: Arc<Hangups>,
    /// The broker was told to stop: it first hands on what it leads.
    pub stop_wanted: AtomicBool,
    /// The broker is stopping.
    pub stopping: AtomicBool,
}

/// The cluster's metadata and where its partitions live on this node.
#[derive(Clone, Default, Debug)]
pub struct View {
    /// This node.
    pub me: i32,
    /// Committed metadata.
    pub image: Image,
    /// Partition → shard, of those that this node holds.
    pub placement: PartitionMap<u32>,
}

/// Memory of a shard for what comes from clients and goes to them, bytes.
#[derive(Clone, Copy, Debug)]
pub struct Buffers {
    /// Requests being read or worked on.
    pub requests: u64,
    /// Answers to fetches.
    pub answers: u64,
    /// Elements of the arrays of one request.
    pub elements: usize,
    /// What fetch sessions remember.
    pub sessions: usize,
}

/// A shard.
pub struct Node {
    /// Its number.
    pub shard: usize,
    /// Known to all.
    pub shared: Arc<Shared>,
    /// Addresses told to clients.
    pub endpoints: RefCell<Arc<Endpoints>>,
    /// Messages to the others.
    pub router: Router,
    /// Storage.
    pub engine: Shard<GlommioHost>,
    /// Time.
    pub host: GlommioHost,
    /// Latest metadata; replaced whole.
    view: RefCell<Arc<View>>,
    /// Fetch sessions of this shard's connections.
    pub sessions: RefCell<Sessions>,
    /// Bytes of requests being read or worked on.
    pub requests: Intake,
    /// Elements that the arrays of one request may have.
    pub elements_max: usize,
    /// Bytes of answers on their way to consumers.
    pub answers: Rc<Budget>,
    /// Connections of clients.
    pub connections: Connections,
    /// Connections that were not taken.
    pub refusals: Seldom,
    /// Connections that were closed for what came over them.
    pub bad_connections: Seldom,
    /// Handshakes of nodes without a certificate that holds.
    pub refused_handshakes: Seldom,
    /// Roles of this shard's partitions.
    pub replication: Replication,
    /// This shard's port for other nodes, in a cluster.
    pub peer_endpoint: RefCell<Option<Rc<Endpoint>>>,
    /// Where other nodes may be reached beside what the metadata says.
    pub contacts: RefCell<Contacts>,
    /// This folder belongs to no cluster yet, and looks for one.
    pub arriving: Cell<bool>,
    /// Brokers whose process seems to have died: clients are not sent to them while others take over what they led.
    pub suspects: RefCell<BTreeSet<i32>>,
    /// Brokers that take part no more, of which clients are still told.
    pub departures: RefCell<Departures>,
    /// Number of this start of the data folder.
    pub start: u64,
    /// When this shard began, ms since the epoch.
    started_ms: i64,
    /// When this shard began; a clock that does not jump.
    pub started: Instant,
    /// Controller and group coordinator, on shard 0.
    pub coordinator: RefCell<Option<Rc<Coordinator>>>,
    /// Wakes what waits for the stop.
    pub stop: WaitList,
    /// Produce requests being worked on.
    pub in_flight: Cell<usize>,
    /// What batches for topics must meet.
    pub produce_rules: RefCell<KnownRules>,
    /// What opens compressed batches.
    pub unpackers: Unpackers,
}

/// What runs on shard 0 only.
pub struct Coordinator {
    /// Metadata changes.
    pub controller: ControllerDriver,
    /// Consumer groups.
    pub groups: GroupsDriver,
    /// Ids for idempotent producers.
    pub producer_ids: ProducerIds,
    /// Moves of partitions between this node's cores.
    pub moves: Moves,
}

/// A partition as a client names it, resolved.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// Its key.
    pub key: PartitionKey,
    /// The shard that has it.
    pub shard: usize,
    /// Who leads.
    pub leader: i32,
    /// Leadership.
    pub leader_epoch: i32,
}

impl Node {
    /// A shard on its storage.
    #[must_use]
    pub fn new(
        shard: usize,
        shared: Arc<Shared>,
        router: Router,
        engine: Shard<GlommioHost>,
        host: GlommioHost,
        buffers: Buffers,
        start: u64,
    ) -> Rc<Self> {
        let slots = shared.settings.number("max.incremental.fetch.session.cache.slots") as usize;
        let started_ms = host.now_ms();
        let contacts = Contacts::new(shared.members.addresses.clone());
        let sessions = Sessions::new(slots.div_ceil(router.shards()), buffers.sessions);
        Rc::new(Self {
            shard,
            shared,
            endpoints: RefCell::default(),
            router,
            engine,
            host,
            view: RefCell::default(),
            sessions: RefCell::new(sessions),
            requests: Intake::new(buffers.requests),
            elements_max: buffers.elements,
            answers: Budget::new(buffers.answers),
            connections: Connections::default(),
            refusals: Seldom::default(),
            bad_connections: Seldom::default(),
            refused_handshakes: Seldom::default(),
            replication: Replication::default(),
            peer_endpoint: RefCell::default(),
            contacts: RefCell::new(contacts),
            arriving: Cell::new(false),
            suspects: RefCell::default(),
            departures: RefCell::default(),
            start,
            started_ms,
            started: Instant::now(),
            coordinator: RefCell::default(),
            stop: WaitList::default(),
            in_flight: Cell::new(0),
            produce_rules: RefCell::default(),
            unpackers: Unpackers::default(),
        })
    }

    /// Addresses told to clients.
    #[must_use]
    pub fn endpoints(&self) -> Arc<Endpoints> {
        Arc::clone(&self.endpoints.borrow())
    }

    /// Metadata now.
    #[must_use]
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.borrow())
    }

    /// Wall clock, ms.
    #[must_use]
    pub fn now_ms(&self) -> i64 {
        self.host.now_ms()
    }

    /// Time since the epoch in ms as of the start, and from then on by a clock that does not jump: for sessions and whatever
    /// else must not end because somebody set the clock.
    #[must_use]
    pub fn steady_ms(&self) -> i64 {
        self.started_ms + self.started.elapsed().as_millis() as i64
    }

    /// Waits.
    pub async fn host_sleep(&self, time: Duration) {
        self.host.sleep(time).await;
    }

    /// Metadata as far as this shard can know it: on the first one what the quorum says, before it is handed to the others.
    #[must_use]
    pub fn known_image(&self) -> Image {
        match &*self.coordinator.borrow() {
            Some(coordinator) => coordinator.controller.quorum.image(),
            None => self.view().image.clone(),
        }
    }

    /// Whether the metadata quorum has a leader, as far as this shard knows.
    #[must_use]
    pub fn hears_a_leader(&self) -> bool {
        match &*self.coordinator.borrow() {
            Some(coordinator) => coordinator.controller.quorum.with(|q| q.leader().is_some()),
            None => true,
        }
    }

    /// The cluster's id: as agreed on, else as the data folder says, where it says one.
    #[must_use]
    pub fn cluster_id(&self) -> String {
        let agreed = self.known_image().cluster_id;
        if !agreed.is_empty() {
            return agreed;
        }
        if self.shared.folder_is_new {
            return String::new();
        }
        self.shared.own_cluster_id.clone()
    }

    /// Whether the broker was told to stop, and may still be serving.
    #[must_use]
    pub fn is_stop_wanted(&self) -> bool {
        self.shared.stop_wanted.load(Ordering::Acquire) || self.is_stopping()
    }

    /// Whether the broker is stopping.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.shared.stopping.load(Ordering::Acquire)
    }

    /// Controller and groups.
    ///
    /// # Panics
    /// On another shard than 0.
    #[must_use]
    pub fn coordinator(&self) -> Rc<Coordinator> {
        Rc::clone(
            self.coordinator
                .borrow()
                .as_ref()
                .expect("the coordinator runs on shard 0"),
        )
    }

    fn forget(&self, key: &PartitionKey, image: &Image) {
        self.replication.removed(key);
        let may_come_back = image.topic_by_id(&key.topic).is_some();
        self.engine.remove_partition(key, may_come_back);
    }

    /// Takes in new metadata: partitions of this shard are made, removed and configured accordingly, and take their roles.
    pub fn install(self: &Rc<Self>, view: Arc<View>, mut recovered: HashMap<PartitionKey, LogState>) {
        let old = self.view.replace(Arc::clone(&view));
        (self.departures.borrow_mut()).note(&old.image, &view.image, Instant::now());
        let mine = |p: &PartitionKey| view.placement.get(p).is_some_and(|s| *s as usize == self.shard);
        for partition in self.engine.partitions() {
            if partition.key != METADATA_KEY && !mine(&partition.key) {
                self.forget(&partition.key, &view.image);
            }
        }
        for topic in view.image.topics() {
            let unchanged = old.image.topic_by_id(&topic.id).is_some_and(|t| Arc::ptr_eq(t, topic));
            let same_config = unchanged
                && old
                    .image
                    .configs(&ConfigResource::Topic(topic.name.clone()))
                    .eq(view.image.configs(&ConfigResource::Topic(topic.name.clone())));
            if same_config && recovered.is_empty() {
                continue;
            }
            let config = log_config(&self.shared.settings, &view.image, topic);
            for (index, image) in topic.partitions.iter().enumerate() {
                let key = PartitionKey {
                    topic: topic.id,
                    partition: index as u32,
                };
                if !mine(&key) {
                    continue;
                }
                let known = self.engine.partition(&key);
                // This folder may have held it before.
                let returns = known.is_none() && !recovered.contains_key(&key) && image.partition_epoch > 0;
                match known {
                    Some(partition) => partition.set_config(config),
                    None => self.add_partition(recovered.remove(&key), key, image, config),
                }
                if returns {
                    self.engine.clear(key);
                }
                if let Some(partition) = self.engine.partition(&key) {
                    replication::assign(self, &partition, image);
                }
            }
        }
    }

    fn add_partition(&self, recovered: Option<LogState>, key: PartitionKey, image: &PartitionImage, config: LogConfig) {
        let mut state = recovered.unwrap_or_else(|| LogState::new(key));
        if image.replicas.len() > 1 {
            state.forget_high_watermark();
        }
        self.engine.add_partition(state, config);
    }

    /// Settings of a partition's log.
    #[must_use]
    pub fn config_of(&self, key: &PartitionKey) -> LogConfig {
        let view = self.view();
        let topic = view.image.topic_by_id(&key.topic);
        topic.map_or_else(LogConfig::default, |topic| {
            log_config(&self.shared.settings, &view.image, topic)
        })
    }

    /// A partition has come from another core, with all that its log held there: it takes its role here.
    pub fn arrived(self: &Rc<Self>, key: &PartitionKey) {
        let view = self.view();
        let image = view.image.partition(&key.topic, key.partition);
        if let (Some(image), Some(partition)) = (image, self.engine.partition(key)) {
            self.engine.resume(&partition);
            replication::assign(self, &partition, image);
        }
    }

    /// Begins a copy anew that has failed, as if it had never been here; its leader sends it all that it lacks.
    pub fn begin_anew(self: &Rc<Self>, key: PartitionKey) {
        let view = self.view();
        let Some((topic, image)) =
            (view.image.topic_by_id(&key.topic)).and_then(|t| Some((t, t.partitions.get(key.partition as usize)?)))
        else {
            return;
        };
        self.forget(&key, &view.image);
        self.add_partition(None, key, image, log_config(&self.shared.settings, &view.image, topic));
        if let Some(partition) = self.engine.partition(&key) {
            replication::assign(self, &partition, image);
        }
    }

    /// Finds a partition of a topic that this node leads, or holds a copy of.
    ///
    /// # Errors
    /// No such partition, or it is on other nodes.
    pub fn resolve_copy(view: &View, topic: &TopicImage, partition: i32) -> Result<Resolved, Failure> {
        let index = usize::try_from(partition).map_err(|_| Failure::unknown_partition())?;
        let image = topic.partitions.get(index).ok_or_else(Failure::unknown_partition)?;
        let key = PartitionKey {
            topic: topic.id,
            partition: index as u32,
        };
        Ok(Resolved {
            key,
            shard: *view.placement.get(&key).ok_or_else(Failure::not_leader)? as usize,
            leader: image.leader,
            leader_epoch: image.leader_epoch,
        })
    }

    /// Finds a partition of a topic that this node leads.
    ///
    /// # Errors
    /// No such partition, or another node leads it.
    pub fn resolve(view: &View, topic: &TopicImage, partition: i32) -> Result<Resolved, Failure> {
        let found = Self::resolve_copy(view, topic, partition)?;
        if found.leader == view.me {
            Ok(found)
        } else {
            Err(Failure::not_leader())
        }
    }
}

/// A topic setting in force.
///
/// # Panics
/// If the registry has no such topic setting: a bug of ours.
#[must_use]
pub fn topic_setting<'a>(settings: &'a Settings, image: &'a Image, topic: &ConfigResource, name: &str) -> &'a str {
    if let Some(value) = image.config(topic, name) {
        return value;
    }
    let entry = find_topic(name).unwrap_or_else(|| panic!("no topic setting {name}"));
    settings.topic_default(entry).0
}

/// The settings that a topic's logs act on.
#[must_use]
pub fn log_config(settings: &Settings, image: &Image, topic: &TopicImage) -> LogConfig {
    let resource = ConfigResource::Topic(topic.name.clone());
    let number = |name| -> i64 {
        topic_setting(settings, image, &resource, name)
            .parse()
            .unwrap_or_else(|_| panic!("{name} was checked when set"))
    };
    // Internal topics are cut by the coordinator's snapshots, not by age.
    let internal = topic.name == OFFSETS_TOPIC;
    // No policy keeps all, as in Kafka 4.2 and later.
    let keeps_all = internal || topic_setting(settings, image, &resource, "cleanup.policy").is_empty();
    LogConfig {
        segment_bytes: number("segment.bytes") as u64,
        segment_ms: number("segment.ms"),
        retention_ms: if keeps_all { -1 } else { number("retention.ms") },
        retention_bytes: if keeps_all { -1 } else { number("retention.bytes") },
        flush_messages: number("flush.messages"),
        flush_ms: number("flush.ms"),
        is_internal: internal,
    }
}
