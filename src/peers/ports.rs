//! The UDP port of each shard, where other nodes reach it.

use std::{
    io::ErrorKind,
    net::{SocketAddr, ToSocketAddrs, UdpSocket},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use millrace_cluster::metadata::Address;
use millrace_engine::host::Host;
use millrace_net::quic::{self, Credentials, Endpoint, LinkError};
use thiserror::Error;

use super::{Members, serve};
use crate::{config::Settings, node::Node, replication};

/// How long a port may be in use before that is an error.
const PATIENCE: Duration = Duration::from_secs(2);
/// Pause before it is tried again.
const AGAIN: Duration = Duration::from_millis(50);

/// Why a port cannot be used.
#[derive(Debug, Error)]
pub enum PortsError {
    /// It cannot be bound.
    #[error("cannot listen on {address}: {reason}; choose another address with --cluster-listen HOST:PORT")]
    Bind {
        /// As configured.
        address: String,
        /// Why.
        reason: String,
    },
    /// The endpoint on it cannot be made.
    #[error(transparent)]
    Endpoint(#[from] LinkError),
}

/// Bound UDP sockets of all shards, and what the others are told of them; none for a node alone.
pub type Ports = Arc<Vec<(UdpSocket, Address)>>;

/// Binds a socket for each shard: the first as configured, the others on any port of the same address.
///
/// # Errors
/// [`PortsError::Bind`].
pub fn bind(settings: &Settings, members: &Members, node_id: i32, shards: usize) -> Result<Ports, PortsError> {
    let Some(told) = members.addresses.get(&node_id) else {
        return Ok(Arc::new(Vec::new()));
    };
    let configured = settings.get("cluster.listen");
    let fail = |reason: String| PortsError::Bind {
        address: configured.to_owned(),
        reason,
    };
    let address = configured
        .to_socket_addrs()
        .map_err(|e| fail(e.to_string()))?
        .next()
        .ok_or_else(|| fail("the name has no address".into()))?;
    let host = told.rsplit_once(':').map_or(told.as_str(), |(host, _)| host);
    let mut sockets = Vec::with_capacity(shards);
    for shard in 0..shards {
        let wanted = if shard == 0 {
            address
        } else {
            SocketAddr::new(address.ip(), 0)
        };
        let socket = bind_one(wanted).map_err(|e| fail(e.to_string()))?;
        let port = socket.local_addr().map_err(|e| fail(e.to_string()))?.port();
        let host = host.to_owned();
        sockets.push((socket, Address { host, port }));
    }
    Ok(Arc::new(sockets))
}

/// Binds a port that a process which was killed a moment ago may still hold: what an io_uring refers to outlives its process while the
/// kernel takes the ring apart.
fn bind_one(address: SocketAddr) -> std::io::Result<UdpSocket> {
    let until = Instant::now() + PATIENCE;
    loop {
        match quic::bind(address) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < until => std::thread::sleep(AGAIN),
            done => return done,
        }
    }
}

/// Lets other nodes reach this shard.
///
/// # Errors
/// [`PortsError`].
pub fn open(node: &Rc<Node>, ports: &Ports, credentials: Option<&Credentials>) -> Result<(), PortsError> {
    let (Some((socket, address)), Some(credentials)) = (ports.get(node.shard), credentials) else {
        return Ok(());
    };
    let socket = socket.try_clone().map_err(|e| PortsError::Bind {
        address: format!("{}:{}", address.host, address.port),
        reason: e.to_string(),
    })?;
    let endpoint = Rc::new(Endpoint::new(socket, credentials)?);
    *node.peer_endpoint.borrow_mut() = Some(Rc::clone(&endpoint));
    glommio::spawn_local(serve::run(Rc::clone(node), endpoint)).detach();
    glommio::spawn_local(replication::leading::run(Rc::clone(node))).detach();
    node.host.spawn(replication::agreed::run(Rc::clone(node)));
    Ok(())
}
