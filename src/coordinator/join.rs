//! How a node comes to take part: a member of the metadata quorum first, then a registered broker.

use std::{rc::Rc, sync::Arc, sync::atomic::Ordering};

use bytes::Bytes;
use millrace_cluster::{
    controller::leadership::MIN_INSYNC,
    metadata::{Address, FEATURE_LEVELS, Image, Member, Registration},
    peer::Arrival,
};
use millrace_engine::log::LogState;
use millrace_net::quic::Credentials;
use thiserror::Error;

use super::{
    balance, brokers,
    controller::ControllerDriver,
    groups::GroupsDriver,
    moves::Moves,
    quorum::{self, MetadataError, QuorumDriver},
};
use crate::{
    identity::{Identity, IdentityError},
    kafka::handlers::init_producer_id::ProducerIds,
    listen::{Bound, ListenError},
    node::{Coordinator, Node, View},
    peers::{
        introduce,
        ports::{self, Ports, PortsError},
        pulse,
        quorum_link::QuorumLink,
    },
};

/// Why a node does not take part.
#[derive(Debug, Error)]
pub enum JoinError {
    /// The metadata log.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// The data folder.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The ports for other nodes.
    #[error(transparent)]
    Ports(#[from] PortsError),
    /// An address for clients.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The metadata is not here, and nobody is there who could send it.
    #[error(
        "the data folder belongs to cluster {0}, but does not hold its metadata: start this node with --cluster-listen and --peers, so that \
         the others send it"
    )]
    NoMetadata(String),
    /// The cluster does not take it.
    #[error("the cluster refuses this broker: {0}")]
    Refused(String),
}

/// What it takes.
pub struct Joining<'a> {
    /// Bound, for other nodes.
    pub ports: &'a Ports,
    /// What this node shows them, in a cluster.
    pub credentials: Option<&'a Credentials>,
    /// Bound, for clients.
    pub bound: Bound,
    /// The metadata log.
    pub recovered: Option<LogState>,
    /// The data folder.
    pub identity: &'a mut Identity,
}

/// Makes this node a member of the metadata quorum, lets other nodes in, listens for clients, and registers it as a
/// broker; `None` if it is told to stop before that.
///
/// # Errors
/// [`JoinError`].
pub async fn join(node: &Rc<Node>, joining: Joining<'_>) -> Result<Option<(Registration, Bound)>, JoinError> {
    let Joining {
        ports,
        credentials,
        bound,
        recovered,
        identity,
    } = joining;
    let shared = Arc::clone(&node.shared);
    let me = shared.node_id;
    let mut stored = quorum::open_log(&node.engine, recovered).await?;
    ports::open(node, ports, credentials)?;
    if identity.is_new {
        match become_member(node, identity, stored).await? {
            Some(records) => stored = records,
            None => return Ok(None),
        }
    }
    if stored.is_empty() && !shared.members.is_cluster() {
        return Err(JoinError::NoMetadata(identity.cluster_id.clone()));
    }
    let election_ms = shared.settings.number("controller.quorum.election.timeout.ms");
    let quorum = Rc::new(QuorumDriver::new(
        &stored,
        me,
        identity.generation,
        election_ms,
        node.start,
    )?);
    *node.coordinator.borrow_mut() = Some(Rc::new(Coordinator {
        controller: ControllerDriver::new(Rc::clone(&quorum)),
        groups: GroupsDriver::new(&shared.settings),
        producer_ids: ProducerIds::default(),
        moves: Moves::default(),
    }));
    let address = ports.first().and_then(|(socket, _)| socket.local_addr().ok());
    if let Some(address) = address
        && let Err(error) = millrace_net::listener::bind(address).and_then(pulse::hold)
    {
        tracing::warn!(%address, %error, "this TCP port cannot be served: others notice a death of this node later");
    }
    link_members(node);
    let n = Rc::clone(node);
    glommio::spawn_local(async move { follow_members(&n).await }).detach();
    let (q, n) = (Rc::clone(&quorum), Rc::clone(node));
    glommio::spawn_local(async move {
        q.run(&n.engine).await;
        // Its log has failed. Others can lead what this node leads, once it is gone; alone, what it has can still be read.
        if !q.with(|quorum| quorum.is_alone()) && !n.is_stopping() {
            n.shared.stopping.store(true, Ordering::Release);
            n.router.wake_all();
        }
    })
    .detach();
    let (q, n) = (Rc::clone(&quorum), Rc::clone(node));
    glommio::spawn_local(async move { q.run_clock(&n.host, || n.is_stopping()).await }).detach();

    bound.listen()?;
    let clients = bound.endpoints.all().iter().map(|e| Address {
        host: e.host.clone(),
        port: e.port,
    });
    let rack = Some(shared.settings.get("broker.rack").to_owned());
    let registration = Registration {
        node: me,
        incarnation: uuid::Uuid::new_v4().into_bytes(),
        directory: shared.directory_id.into_bytes(),
        clients: clients.collect(),
        peers: ports.iter().map(|(_, address)| address.clone()).collect(),
        rack: rack.filter(|r| !r.is_empty()),
        min_insync: shared.settings.number(MIN_INSYNC) as u32,
        start: node.start,
        levels: FEATURE_LEVELS,
    };
    let stopped = async {
        node.stop.wait(|| node.is_stop_wanted().then_some(())).await;
        None
    };
    let registering = async { Some(brokers::register(node, &registration).await) };
    match futures_lite::future::or(registering, stopped).await {
        None => Ok(None),
        Some(Err(refused)) => Err(JoinError::Refused(refused.message)),
        Some(Ok(())) => Ok(Some((registration, bound))),
    }
}

/// Finds the place of a new folder: in a cluster that there is, or in one that begins with it. Returns the metadata log's records;
/// `None` if the broker is told to stop before that.
async fn become_member(
    node: &Rc<Node>,
    identity: &mut Identity,
    stored: Vec<Bytes>,
) -> Result<Option<Vec<Bytes>>, JoinError> {
    let own_id = identity.cluster_id.clone();
    if !stored.is_empty() {
        // It had begun one when it was stopped.
        identity.join(&own_id, 0)?;
        return Ok(Some(stored));
    }
    let arrival = match node.shared.members.is_cluster() {
        true => introduce::find_cluster(node).await,
        false => {
            let directory = node.shared.directory_id.into_bytes();
            Some(Arrival::Found(vec![(node.shared.node_id, directory, String::new())]))
        }
    };
    match arrival {
        None | Some(Arrival::Wait(_)) => Ok(None),
        Some(Arrival::Join {
            cluster_id,
            generation,
            members,
        }) => {
            tracing::info!(cluster_id, "this node joins a cluster");
            identity.join(&cluster_id, generation)?;
            node.contacts.borrow_mut().tell(members);
            Ok(Some(Vec::new()))
        }
        Some(Arrival::Found(founders)) => {
            let members = founders.into_iter().map(|(node, directory, address)| Member {
                node,
                directory,
                generation: 0,
                address,
                voter: true,
            });
            let founding = millrace_cluster::raft::found(&own_id, members.collect(), FEATURE_LEVELS.1);
            let stored = quorum::begin_log(&node.engine, founding).await?;
            identity.join(&own_id, 0)?;
            tracing::info!(cluster_id = own_id, "a new cluster begins");
            Ok(Some(stored))
        }
    }
}

/// Keeps links to all members of the quorum, as they come and go.
async fn follow_members(node: &Rc<Node>) {
    let coordinator = node.coordinator();
    let quorum = &coordinator.controller.quorum;
    let mut seen = 0;
    while !node.is_stopping() {
        quorum
            .changes()
            .wait(|| {
                let version = quorum.with(|q| q.image().version);
                (version != seen || node.is_stopping()).then(|| seen = version)
            })
            .await;
        link_members(node);
    }
}

fn link_members(node: &Rc<Node>) {
    let me = node.shared.node_id;
    let coordinator = node.coordinator();
    let quorum = &coordinator.controller.quorum;
    // Before this member knows the others, whoever it was told of may lead them.
    let members: Vec<i32> = match quorum.with(|q| q.knows_members()) {
        true => quorum.with(|q| q.image().members().map(|m| m.node).collect()),
        false => node.contacts.borrow().nodes().collect(),
    };
    for peer in members.iter().copied().filter(|n| *n != me) {
        let link = Rc::new(QuorumLink::default());
        if quorum.add_link(peer, &link) && node.shared.members.is_cluster() {
            let n = Rc::clone(node);
            glommio::spawn_local(async move { link.run(&n, peer).await }).detach();
            glommio::spawn_local(pulse::watch(Rc::clone(node), peer)).detach();
        }
    }
    quorum.keep_links(|n| members.contains(&n));
}

/// Starts what the coordinator shard does for as long as the node runs; `view` is what its shards have installed.
pub fn coordinate(node: &Rc<Node>, registration: Registration, view: &Arc<View>) {
    node.coordinator()
        .groups
        .metadata_changed(node, &Image::default(), &view.image);
    let n = Rc::clone(node);
    glommio::spawn_local(async move { n.coordinator().controller.run_installs(&n).await }).detach();
    let n = Rc::clone(node);
    glommio::spawn_local(async move { n.coordinator().groups.run_clock(&n).await }).detach();
    let n = Rc::clone(node);
    glommio::spawn_local(async move { brokers::run(&n, registration).await }).detach();
    let n = Rc::clone(node);
    glommio::spawn_local(async move { n.coordinator().moves.run(&n).await }).detach();
    let n = Rc::clone(node);
    glommio::spawn_local(async move { balance::run(&n).await }).detach();
}
