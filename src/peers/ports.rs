//! The UDP port of each shard, where other nodes reach it.

use std::{
    fmt::Display,
    net::{SocketAddr, ToSocketAddrs, UdpSocket},
    rc::Rc,
    sync::Arc,
};

use millrace_cluster::metadata::Address;
use millrace_engine::host::Host;
use millrace_net::quic::{self, Credentials, Endpoint, LinkError};
use thiserror::Error;

use super::{Members, serve};
use crate::{address, config::Settings, node::Node, replication};

/// Why a port cannot be used.
#[derive(Debug, Error)]
pub enum PortsError {
    /// It cannot be bound.
    #[error(
        "cannot listen on {address}, for the nodes of the cluster (UDP, shard {shard} of {shards}): {reason}; shards take the port of \
         --cluster-listen HOST:PORT and those behind it, choose others"
    )]
    Bind {
        /// As configured, or behind that.
        address: String,
        /// Whose it would be.
        shard: usize,
        /// As many ports are needed.
        shards: usize,
        /// Why.
        reason: String,
    },
    /// The endpoint on it cannot be made.
    #[error(transparent)]
    Endpoint(#[from] LinkError),
}

/// Bound UDP sockets of all shards, and what the others are told of them; none for a node alone.
pub type Ports = Arc<Vec<(UdpSocket, Address)>>;

/// Binds a socket for each shard: the first as configured, the others on the ports behind it.
///
/// # Errors
/// [`PortsError::Bind`].
pub fn bind(settings: &Settings, members: &Members, node_id: i32, shards: usize) -> Result<Ports, PortsError> {
    let Some(told) = members.addresses.get(&node_id) else {
        return Ok(Arc::new(Vec::new()));
    };
    let configured = settings.get("cluster.listen");
    let fail = |shard: usize, address: &dyn Display, reason: &dyn Display| PortsError::Bind {
        address: address.to_string(),
        shard,
        shards,
        reason: reason.to_string(),
    };
    let mut found = configured.to_socket_addrs().map_err(|e| fail(0, &configured, &e))?;
    let first = (found.next()).ok_or_else(|| fail(0, &configured, &"the name has no address"))?;
    let (host, told) = address::split_told(told).map_err(|e| fail(0, told, &e))?;
    let mut sockets = Vec::with_capacity(shards);
    for shard in 0..shards {
        let behind = |port: u16| {
            let port = u16::try_from(usize::from(port) + shard);
            port.map_err(|_| fail(shard, &configured, &"there are no ports beyond 65535"))
        };
        let address = SocketAddr::new(first.ip(), behind(first.port())?);
        let socket = address::bind_patiently(|| quic::bind(address)).map_err(|e| fail(shard, &address, &e))?;
        let told = Address {
            host: host.to_owned(),
            // Whoever maps ports maps one for each shard.
            port: behind(told)?,
        };
        sockets.push((socket, told));
    }
    Ok(Arc::new(sockets))
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
        address: address::join(&address.host, address.port),
        shard: node.shard,
        shards: ports.len(),
        reason: e.to_string(),
    })?;
    let endpoint = Rc::new(Endpoint::new(socket, credentials)?);
    *node.peer_endpoint.borrow_mut() = Some(Rc::clone(&endpoint));
    glommio::spawn_local(serve::run(Rc::clone(node), endpoint)).detach();
    glommio::spawn_local(replication::leading::run(Rc::clone(node))).detach();
    node.host.spawn(replication::agreed::run(Rc::clone(node)));
    Ok(())
}
