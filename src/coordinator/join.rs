//! How a node comes to take part: a member of the metadata quorum first, then a registered broker.

use std::{net::SocketAddr, rc::Rc, sync::Arc, sync::atomic::Ordering};

use millrace_cluster::metadata::{Address, Image, Registration};
use millrace_engine::log::LogState;
use millrace_net::quic::Credentials;
use thiserror::Error;

use super::{
    brokers,
    controller::ControllerDriver,
    groups::GroupsDriver,
    quorum::{MetadataError, QuorumDriver},
};
use crate::{
    kafka::handlers::init_producer_id::ProducerIds,
    listen::{self, Bound, ListenError},
    node::{Coordinator, Node, View},
    peers::{
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
    /// The ports for other nodes.
    #[error(transparent)]
    Ports(#[from] PortsError),
    /// An address for clients.
    #[error(transparent)]
    Listen(#[from] ListenError),
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
    /// Where clients shall connect.
    pub clients_at: SocketAddr,
    /// The metadata log.
    pub recovered: Option<LogState>,
    /// This start of the broker.
    pub incarnation: u64,
}

/// Makes this node a member of the metadata quorum, lets other nodes in, binds what clients connect to, and registers it as a
/// broker; `None` if it is told to stop before that.
///
/// # Errors
/// [`JoinError`].
pub async fn join(node: &Rc<Node>, joining: Joining<'_>) -> Result<Option<(Registration, Bound)>, JoinError> {
    let Joining {
        ports,
        credentials,
        clients_at,
        recovered,
        incarnation,
    } = joining;
    let shared = Arc::clone(&node.shared);
    let (me, members) = (shared.node_id, &shared.members);
    let voters = if members.is_cluster() {
        members.addresses.keys().copied().collect()
    } else {
        vec![me]
    };
    let election_ms = shared.settings.number("controller.quorum.election.timeout.ms");
    let quorum = QuorumDriver::open(&node.engine, recovered, me, voters, election_ms, incarnation).await?;
    let quorum = Rc::new(quorum);
    *node.coordinator.borrow_mut() = Some(Rc::new(Coordinator {
        controller: ControllerDriver::new(Rc::clone(&quorum)),
        groups: GroupsDriver::new(&shared.settings),
        producer_ids: ProducerIds::default(),
    }));
    // Whoever comes finds the member there.
    ports::open(node, ports, credentials)?;
    if let Some(address) = ports.first().and_then(|(socket, _)| socket.local_addr().ok()) {
        match millrace_net::listener::bind(address) {
            Ok(socket) => {
                glommio::spawn_local(pulse::hold(Rc::clone(node), socket)).detach();
            }
            Err(error) => {
                tracing::warn!(%address, %error, "this TCP port cannot be bound: others notice a death of this node later")
            }
        }
    }
    for peer in members.addresses.keys().copied().filter(|n| *n != me) {
        let link = Rc::new(QuorumLink::default());
        quorum.add_link(peer, Rc::clone(&link));
        let n = Rc::clone(node);
        glommio::spawn_local(async move { link.run(&n, peer).await }).detach();
        glommio::spawn_local(pulse::watch(Rc::clone(node), peer)).detach();
    }
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

    let bound = listen::bind_all(node, clients_at)?;
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
}
