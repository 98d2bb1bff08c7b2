//! Start and stop: in which order, and on which threads.
//!
//! Start: folder locked → sockets bound → shard 0 recovers it → it joins the metadata quorum → registered as a broker →
//! partitions placed → every shard opens its own → clients let in → ready. Stop: no more connections → work in flight ends → everything in segments, with
//! checkpoints → exit.

use std::{
    collections::HashMap,
    io::{self, Write},
    path::{Path, PathBuf},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use glommio::{Latency, LocalExecutorBuilder, Placement, Shares, io::DmaFile};
use millrace_engine::{
    PartitionKey, PartitionMap, StorageError,
    agreed::Agreed,
    disk::glommio::{GlommioHost, helpers, settle},
    host::Host,
    log::LogState,
    recovery,
    shard::{Shard, ShardConfig},
};
use millrace_net::kafka::shape::ELEMENTS_MAX;
use rustix::fs::Mode;
use thiserror::Error;

use crate::{
    config::{ConfigError, Settings, Source, parse_size},
    container::{self, Limit, MEMORY_MIN},
    coordinator::{
        brokers,
        join::{self, JoinError, Joining},
    },
    cpus, doctor,
    identity::{self, Identity, IdentityError},
    kafka::{
        hangups::Hangups,
        idle,
        intake::{ELEMENT_BYTES, ELEMENTS_LEAST},
    },
    listen::{self, Bound, ListenError},
    node::{Buffers, METADATA_KEY, Node, Shared, View},
    peers::{
        ClusterConfigError, Members,
        credentials::{self, CredentialsError},
        ports::{self, Ports, PortsError},
    },
    replication,
    router::{Job, Router},
};

/// How long a stop waits for requests in flight.
const DRAIN: Duration = Duration::from_secs(10);
/// How long a stop waits for other nodes to take note of it.
const FAREWELL: Duration = Duration::from_millis(100);
/// Why the broker did not start, or stopped.
#[derive(Debug, Error)]
pub enum ServeError {
    /// A setting.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The data folder.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The host.
    #[error("this host is not fit: {0}")]
    Host(String),
    /// The disk.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// An address.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Settings of the cluster.
    #[error(transparent)]
    Members(#[from] ClusterConfigError),
    /// Certificates.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// The ports for other nodes.
    #[error(transparent)]
    Ports(#[from] PortsError),
    /// The cluster.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The metadata quorum.
    #[error("this node cannot take part in the metadata quorum: {0}")]
    Quorum(String),
    /// A thread.
    #[error("a shard cannot be started: {0}")]
    Executor(String),
    /// Another shard failed first.
    #[error("another shard failed")]
    Other,
}

/// What an idempotent producer takes that a partition remembers, with what a checkpoint holds of it.
const PRODUCER_BYTES: u64 = 512;

/// Open files of a process and of each of its shards beside segments and connections: journals, rings, sockets, checkpoints.
const FILES_OF_PROCESS: u64 = 96;
const FILES_OF_SHARD: u64 = 32;
/// No more files than this are reckoned with.
const FILES_MAX: u64 = 1 << 20;

/// Files that this process may have open, as many as its host lets it have: what a shell gives (1,024) is meant for programs that use
/// select(2).
fn files_allowed() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let given = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: given.maximum,
        ..given
    };
    let allowed = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => given.maximum,
        Err(_) => given.current,
    };
    allowed.unwrap_or(FILES_MAX).min(FILES_MAX)
}

/// The memory budget, of at most what this process may use.
fn memory(settings: &Settings, limit: Option<&Limit>) -> Result<u64, ConfigError> {
    let invalid = |reason: String| ConfigError::Invalid { reason };
    let memory = parse_size(settings.get("memory")).map_err(invalid)?;
    if memory < MEMORY_MIN {
        return Err(invalid(format!("memory is {memory} bytes; at least 64MiB is needed")));
    }
    let Some(limit) = limit else { return Ok(memory) };
    let (mib, fit) = (memory >> 20, limit.default_memory() >> 20);
    if limit.is_exceeded_by(memory) {
        return Err(invalid(format!(
            "memory is {mib} MiB, and this process may use {limit}: it would be killed. Raise the limit, or give {fit}MiB"
        )));
    }
    if limit.is_tight_for(memory) {
        tracing::warn!(
            "memory is {mib} MiB, of {limit} that this process may use: that leaves little for what memory does not count, \
             and the kernel kills whoever uses more; {fit}MiB would be safe"
        );
    }
    Ok(memory)
}

/// How the memory budget, and the files that may be open, are divided; per shard if nothing else is said.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    journal_slot: u64,
    journal_slots: u32,
    tail: usize,
    read_cache: usize,
    queue: u64,
    producers: usize,
    buffers: Buffers,
    /// Segment files.
    open_files: usize,
    /// Connections of clients, of all shards: what is left. Without that, they would take the files of logs.
    connections: usize,
}

impl Sizes {
    fn new(settings: &Settings, memory: u64, shards: usize) -> Self {
        // A quarter stays for connections, the producers remembered, and the allocator.
        let whole = memory / shards as u64;
        let part = whole / 4 * 3;
        // Batches not in segments yet are held in memory, so the ring must not be larger than the tail.
        let journal = (settings.number("journal.bytes") as u64).min(part / 3);
        let slots = if journal >= 32 << 20 { 8 } else { 4 };
        let (files, shards) = (files_allowed(), shards as u64);
        let open_files = (files / 2 / shards).clamp(16, 100_000);
        let others = FILES_OF_PROCESS + (open_files + FILES_OF_SHARD) * shards;
        let connections = files
            .saturating_sub(others)
            .min(settings.number("max.connections") as u64);
        Self {
            open_files: open_files as usize,
            connections: connections as usize,
            journal_slot: (journal / slots) & !((1 << 12) - 1),
            journal_slots: slots as u32,
            tail: (part / 2) as usize,
            read_cache: (part / 4) as usize,
            queue: part / 8,
            producers: (whole / 16 / PRODUCER_BYTES) as usize,
            buffers: Buffers {
                requests: part / 8,
                answers: part / 8,
                sessions: (whole / 32) as usize,
                elements: ((whole / 8) as usize / ELEMENT_BYTES).clamp(ELEMENTS_LEAST, ELEMENTS_MAX),
            },
        }
    }
}

/// What every shard's thread is given.
#[derive(Clone)]
struct Context {
    shared: Arc<Shared>,
    /// Cores for what takes long.
    beside: Arc<[usize]>,
    router: Router,
    sizes: Sizes,
    ports: Ports,
    credentials: Option<Arc<credentials::Loaded>>,
    started: Instant,
}

/// What the first shard alone is given.
struct First {
    /// To the others.
    inits: Vec<flume::Sender<Init>>,
    identity: Identity,
    bound: Bound,
    /// The others are ready.
    ready: flume::Receiver<usize>,
}

/// What shard 0 tells the others once the folder is recovered.
struct Init {
    incarnation: u64,
    partitions: Vec<LogState>,
    agreed: PartitionMap<Agreed>,
    view: Arc<View>,
}

/// Runs a broker until it is told to stop.
///
/// # Errors
/// [`ServeError`].
pub fn serve(mut settings: Settings) -> Result<(), ServeError> {
    let started = Instant::now();
    if !settings.unused().is_empty() {
        tracing::info!(
            settings = settings.unused().join(", "),
            "settings of Kafka that have no meaning here are passed over"
        );
    }
    let listen = listen::resolve(&settings)?;
    let dir = PathBuf::from(settings.get("data.dir"));
    // Users outside the broker's group have no access to the files of records, whatever the umask of the shell that starts it.
    let umask = rustix::process::umask(Mode::RWXO);
    rustix::process::umask(umask | Mode::RWXO);
    // The first touch of a huge page clears 2 MiB at once: milliseconds in which the shard does nothing else
    // (kernel-notes.md). An old kernel that cannot switch them off only loses that.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    if let Some(fatal) = doctor::examine(&dir)
        .into_iter()
        .find(|f| f.level == doctor::Level::Fatal)
    {
        return Err(ServeError::Host(format!("{}: {}", fatal.what, fatal.text)));
    }
    let node_id = (settings.source("node.id") == Source::Static).then(|| settings.number("node.id") as i32);
    // The second is dropped behind all that uses the folder.
    let (identity, _undo) = identity::open(&dir, node_id)?;
    identity
        .watch()
        .map_err(|e| ServeError::Host(format!("no thread to watch the data folder: {e}")))?;
    let allowed = cpus::allowed();
    let usable = cpus::usable();
    let shards = cpus::shards(usable, settings.number("cores") as usize);
    if usable < allowed.len() && shards > usable {
        tracing::warn!(
            shards,
            cores = usable,
            "a CPU quota gives this process the time of fewer cores than it has shards: they will be stopped in between"
        );
    }
    let cpus = cpus::of_shards(&allowed, shards, identity.node_id);
    let limit = container::memory(Path::new("/"));
    if let Some(limit) = &limit {
        settings.adapt("memory", format!("{}MiB", limit.default_memory() >> 20));
    }
    let memory = memory(&settings, limit.as_ref())?;
    let sizes = Sizes::new(&settings, memory, cpus.len());
    let spin = Duration::from_micros(settings.number("spin.us") as u64);
    let dir = dir.canonicalize().unwrap_or(dir);
    let members = Members::parse(&settings, identity.node_id)?;
    let credentials = if members.is_cluster() {
        Some(Arc::new(credentials::load(&settings, &members, identity.node_id)?))
    } else {
        None
    };
    let ports = ports::bind(&settings, &members, identity.node_id, cpus.len())?;
    let hangups =
        Hangups::start().map_err(|e| ServeError::Host(format!("clients that hang up cannot be noticed: {e}")))?;
    let bound = listen::bind_all(&settings, identity.node_id, cpus.len(), listen)?;
    let (router, mailboxes) = Router::new(cpus.len());
    let beside = cpus::beside(&allowed, &cpus);
    let context = Context {
        beside: beside.as_slice().into(),
        shared: Arc::new(Shared {
            settings,
            own_cluster_id: identity.cluster_id.clone(),
            folder_is_new: identity.is_new,
            members,
            node_id: identity.node_id,
            directory_id: identity.directory_id,
            data_dir: dir,
            connections: AtomicUsize::new(0),
            connections_max: sizes.connections,
            hangups,
            stop_wanted: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        }),
        router,
        sizes,
        ports,
        credentials,
        started,
    };
    watch_signals(&context)?;

    let (ready_tx, ready_rx) = flume::unbounded::<usize>();
    let (init_tx, init_rx): (Vec<_>, Vec<_>) = (0..cpus.len()).map(|_| flume::bounded::<Init>(1)).unzip();
    // The first shard alone needs the folder's identity, to note the cluster that it joins, and has the others' sockets until then.
    let mut first = Some(First {
        inits: init_tx,
        identity,
        bound,
        ready: ready_rx,
    });
    let helpers = helpers(&beside).map_err(|e| ServeError::Executor(e.to_string()))?;
    let mut threads = Vec::new();
    for (shard, ((cpu, mailbox), init)) in cpus.into_iter().zip(mailboxes).zip(init_rx).enumerate() {
        let (context, ready_tx) = (context.clone(), ready_tx.clone());
        let first = if shard == 0 { first.take() } else { None };
        let thread = LocalExecutorBuilder::new(Placement::Fixed(cpu))
            .name(&format!("shard-{shard}"))
            .io_memory(1 << 20)
            .spin_before_park(spin)
            .blocking_thread_pool_placement(helpers.clone())
            .spawn(move || async move {
                let (failed, router) = (context.shared.clone(), context.router.clone());
                let result = match first {
                    Some(first) => first_shard(context, mailbox, first).await,
                    None => other_shard(context, shard, mailbox, init, ready_tx).await,
                };
                if let Err(error) = &result {
                    tracing::error!(shard, %error, "a shard ended; the broker stops");
                    failed.stopping.store(true, Ordering::Release);
                    router.wake_all();
                }
                settle().await;
                result
            })
            .map_err(|e| ServeError::Executor(e.to_string()))?;
        threads.push(thread);
    }
    drop(ready_tx);
    let mut result = Ok(());
    for thread in threads {
        let one = thread
            .join()
            .map_err(|e| ServeError::Executor(e.to_string()))
            .and_then(|r| r);
        if let (Ok(()) | Err(ServeError::Other), Err(error)) = (&result, one) {
            result = Err(error);
        }
    }
    result
}

fn watch_signals(context: &Context) -> Result<(), ServeError> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let mut signals =
        signal_hook::iterator::Signals::new([SIGTERM, SIGINT]).map_err(|e| ServeError::Executor(e.to_string()))?;
    let (shared, router) = (Arc::clone(&context.shared), context.router.clone());
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                if shared.stop_wanted.swap(true, Ordering::AcqRel) {
                    // Not a log line, which would have to be waited for.
                    _ = writeln!(io::stderr(), "millrace: told to stop twice: exiting at once");
                    std::process::exit(130);
                }
                tracing::info!(signal, "stopping");
                router.wake_all();
            }
        })
        .map_err(|e| ServeError::Executor(e.to_string()))?;
    Ok(())
}

fn shard_config(context: &Context, shard: usize, incarnation: u64) -> ShardConfig {
    let settings = &context.shared.settings;
    ShardConfig {
        dir: context.shared.data_dir.clone(),
        shard: shard as u32,
        incarnation,
        journal_slot_bytes: context.sizes.journal_slot,
        journal_slots: context.sizes.journal_slots,
        direct_bytes_min: 64 << 10,
        room_ahead_min: 256 << 10,
        queue_bytes: context.sizes.queue,
        tail_bytes: context.sizes.tail,
        read_cache_bytes: context.sizes.read_cache,
        open_files: context.sizes.open_files,
        sync_all_min: 32,
        free_bytes_min: settings.number("disk.free.bytes.min") as u64,
        retention_check: Duration::from_millis(settings.number("log.retention.check.interval.ms").unsigned_abs()),
        producer_expiration_ms: settings.number("producer.id.expiration.ms"),
        producers_max: context.sizes.producers,
    }
}

/// The host of this thread's executor, whose kernel workers run on the cores `beside`.
pub(crate) async fn new_host(data_dir: &Path, beside: &[usize]) -> Result<GlommioHost, ServeError> {
    // glommio probes the device with the first file it opens, and wrongly if that one is empty (kernel-notes.md).
    let path = data_dir.join(identity::FILE);
    let probe = DmaFile::open(&path)
        .await
        .map_err(|e| ServeError::Executor(e.to_string()))?;
    probe.close().await.map_err(|e| ServeError::Executor(e.to_string()))?;
    let background = glommio::executor().create_task_queue(Shares::Static(200), Latency::NotImportant, "background");
    GlommioHost::new(background, beside, data_dir)
        .map_err(|e| ServeError::Executor(format!("the journal's ring, or the data folder: {e}")))
}

fn new_node(
    context: &Context,
    shard: usize,
    engine: Shard<GlommioHost>,
    host: GlommioHost,
    mailbox: flume::Receiver<Job>,
    start: u64,
) -> Rc<Node> {
    let node = Node::new(
        shard,
        Arc::clone(&context.shared),
        context.router.clone(),
        engine,
        host,
        context.sizes.buffers,
        start,
    );
    let n = Rc::clone(&node);
    glommio::spawn_local(async move {
        while let Ok(job) = mailbox.recv_async().await {
            glommio::spawn_local(job(Rc::clone(&n))).detach();
        }
    })
    .detach();
    let n = Rc::clone(&node);
    node.host.spawn(async move { n.engine.run_housekeeping().await });
    let n = Rc::clone(&node);
    node.host.spawn(async move { idle::watch(&n).await });
    node
}

fn spawn_commits(engine: &Shard<GlommioHost>) {
    let engine = engine.clone();
    glommio::spawn_local(async move { engine.run_commits().await }).detach();
}

async fn first_shard(context: Context, mailbox: flume::Receiver<Job>, first: First) -> Result<(), ServeError> {
    let First {
        inits,
        mut identity,
        bound,
        ready,
    } = first;
    let host = new_host(&context.shared.data_dir, &context.beside).await?;
    let shards = context.router.shards();
    if !identity.is_new {
        recovery::check_served(&host, &shard_config(&context, 0, 0))?;
    }
    let recovered = recovery::recover(&host, &shard_config(&context, 0, 0), shards as u32).await?;
    for (path, position) in &recovered.torn {
        tracing::warn!(file = %path.display(), position, "the last write was torn by the crash and never acknowledged; it was left out");
    }
    let incarnation = recovered.incarnation;
    let engine = Shard::open(host.clone(), shard_config(&context, 0, incarnation)).await?;
    spawn_commits(&engine);
    let mut logs: HashMap<PartitionKey, LogState> = recovered.partitions.into_iter().map(|s| (s.key, s)).collect();
    let node = new_node(&context, 0, engine, host.clone(), mailbox, incarnation);
    let agreed = replication::agreed::find(&node).await?;
    replication::agreed::remember(&node, agreed.clone());
    let metadata = logs.remove(&METADATA_KEY);
    if let Some(loaded) = &context.credentials {
        let (n, first_to_end) = (Rc::clone(&node), loaded.first_to_end.clone());
        glommio::spawn_local(async move { first_to_end.remind(async |time| n.host_sleep(time).await).await }).detach();
    }
    let to_join = Joining {
        ports: &context.ports,
        credentials: context.credentials.as_deref().map(|l| &l.credentials),
        bound,
        recovered: metadata.clone(),
        identity: &mut identity,
    };
    let joined = join::join(&node, to_join).await?;
    let Some((registration, bound)) = joined else {
        // Told to stop before a quorum was there.
        return wait_and_stop(&node).await;
    };
    let image = node.coordinator().controller.quorum.image();
    identity.check_cluster(&image.cluster_id)?;
    node.coordinator().controller.remember(recovered.homes);
    let placement = (node.coordinator().controller).place(&image, shards, context.shared.node_id);
    let view = Arc::new(View {
        me: context.shared.node_id,
        image,
        placement,
    });
    let (stay, gone): (Vec<LogState>, Vec<LogState>) =
        (logs.into_values()).partition(|log| view.placement.contains_key(&log.key));
    if gone.iter().any(|log| view.image.topic_by_id(&log.key.topic).is_some()) {
        // They may come back here: nothing must say then that this folder has them.
        let stay = stay.iter().chain(&metadata);
        recovery::store_base(
            &host,
            &shard_config(&context, 0, incarnation),
            incarnation,
            shards as u32,
            stay,
        )
        .await?;
    }
    for log in gone {
        if let Err(error) = node.engine.remove_files(&log.key) {
            tracing::warn!(partition = %log.key, %error, "files of a partition that is not here any more cannot be removed");
        }
    }
    let mut parts: Vec<Vec<LogState>> = (0..shards).map(|_| Vec::new()).collect();
    for log in stay {
        parts[view.placement[&log.key] as usize].push(log);
    }
    let mut parts = parts.into_iter();
    let mine = parts.next().unwrap_or_default();
    for (tx, partitions) in inits.iter().skip(1).zip(parts) {
        let init = Init {
            incarnation,
            partitions,
            agreed: agreed.clone(),
            view: Arc::clone(&view),
        };
        tx.send_async(init).await.map_err(|_| ServeError::Other)?;
    }
    let partitions = view.placement.len();
    node.install(Arc::clone(&view), mine.into_iter().map(|s| (s.key, s)).collect());
    for _ in 1..shards {
        ready.recv_async().await.map_err(|_| ServeError::Other)?;
    }
    join::coordinate(&node, registration, &view);
    let address = bound.address.clone();
    listen::accept(&node, bound).await?;
    tracing::info!(
        shards,
        partitions,
        incarnation,
        replayed = recovered.replayed,
        memory = context.shared.settings.get("memory"),
        start_ms = context.started.elapsed().as_millis() as u64,
        data = %context.shared.data_dir.display(),
        "started"
    );
    // Who waits for this line reads it; a broker serves without anybody that does.
    _ = writeln!(io::stdout(), "millrace: ready, Kafka clients connect to {address}");
    wait_and_stop(&node).await
}

async fn other_shard(
    context: Context,
    shard: usize,
    mailbox: flume::Receiver<Job>,
    init: flume::Receiver<Init>,
    ready: flume::Sender<usize>,
) -> Result<(), ServeError> {
    let init = init.recv_async().await.map_err(|_| ServeError::Other)?;
    let host = new_host(&context.shared.data_dir, &context.beside).await?;
    let engine = Shard::open(host.clone(), shard_config(&context, shard, init.incarnation)).await?;
    spawn_commits(&engine);
    let node = new_node(&context, shard, engine, host, mailbox, init.incarnation);
    replication::agreed::remember(&node, init.agreed);
    ports::open(
        &node,
        &context.ports,
        context.credentials.as_deref().map(|l| &l.credentials),
    )?;
    node.install(init.view, init.partitions.into_iter().map(|s| (s.key, s)).collect());
    ready.send_async(shard).await.map_err(|_| ServeError::Other)?;
    drop(ready);
    wait_and_stop(&node).await
}

async fn wait_and_stop(node: &Rc<Node>) -> Result<(), ServeError> {
    if node.shard == 0 {
        node.stop.wait(|| node.is_stop_wanted().then_some(())).await;
        if !node.is_stopping() {
            // Without a coordinator it is in no quorum yet, and leads nothing.
            if node.coordinator.borrow().is_some() {
                brokers::resign(node).await;
            }
            node.shared.stopping.store(true, Ordering::Release);
            node.router.wake_all();
        }
    }
    node.stop.wait(|| node.is_stopping().then_some(())).await;
    let until = Instant::now() + DRAIN;
    while node.in_flight.get() > 0 && Instant::now() < until {
        node.host.sleep(Duration::from_millis(5)).await;
    }
    if let Some(stage) = node.engine.poisoned() {
        return Err(StorageError::Poisoned { stage }.into());
    }
    let endpoint = node.peer_endpoint.take();
    if let Some(endpoint) = endpoint {
        // The peers need not find out by themselves; those that are gone are not waited for.
        futures_lite::future::or(endpoint.close(), node.host.sleep(FAREWELL)).await;
    }
    replication::agreed::note(node).await;
    node.engine.close().await?;
    let coordinator = node.coordinator.borrow().clone();
    if let Some(reason) = coordinator.and_then(|c| c.controller.quorum.failed()) {
        return Err(ServeError::Quorum(reason));
    }
    tracing::info!(shard = node.shard, "stopped");
    Ok(())
}
