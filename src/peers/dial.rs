//! Opening a stream to a shard of another node.

use std::{
    cell::Cell,
    net::{SocketAddr, ToSocketAddrs},
    rc::Rc,
    time::Duration,
};

use millrace_cluster::{
    metadata::record,
    peer::{Hello, HelloAnswer, StreamKind, VERSIONS},
};
use millrace_engine::host::Host;
use millrace_net::quic::{Connection, FrameReceiver, FrameSender, LinkError};

use super::FRAME_MAX;
use crate::{address, node::Node};

/// How long connecting may take, and the first answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// An open stream.
pub struct Stream {
    /// Keeps the connection open.
    pub connection: Connection,
    /// Frames there.
    pub tx: FrameSender,
    /// Frames back.
    pub rx: FrameReceiver,
    /// Version of what is said over it.
    pub version: u16,
}

/// Opens a stream of a kind to a shard of a node.
///
/// # Errors
/// [`LinkError`]: no way there, or refused, with the peer's reason.
pub async fn open(node: &Rc<Node>, to: i32, shard: u32, kind: StreamKind) -> Result<Stream, LinkError> {
    let dialed = address(node, to, shard)?;
    let reached = Cell::new(false);
    let opening = open_now(node, (to, shard), kind, &dialed, &reached);
    let patience = async {
        node.host.sleep(PATIENCE).await;
        Err(LinkError::Lost(format!("node {to} does not answer at {dialed}")))
    };
    let opened = futures_lite::future::or(opening, patience).await;
    // One that refuses is there.
    if !reached.get() && shard == 0 {
        let registered = registered(node, to);
        node.contacts.borrow_mut().failed(to, &dialed, registered.as_deref());
    }
    opened
}

async fn open_now(
    node: &Rc<Node>,
    (to, shard): (i32, u32),
    kind: StreamKind,
    dialed: &str,
    reached: &Cell<bool>,
) -> Result<Stream, LinkError> {
    let address = resolve(dialed).await?;
    let endpoint = node
        .peer_endpoint
        .borrow()
        .clone()
        .ok_or_else(|| LinkError::Lost("this node has no endpoint".into()))?;
    let connection = endpoint.connect(address, to).await?;
    reached.set(true);
    let (mut tx, mut rx) = connection.open(FRAME_MAX).await?;
    let hello = Hello {
        versions: VERSIONS,
        kind,
        cluster_id: node.cluster_id(),
        node: node.shared.node_id,
        directory: node.shared.directory_id.into_bytes(),
        start: node.start,
        address: node.shared.members.own_address(node.shared.node_id),
        to_node: to,
        to_shard: shard,
    };
    tx.send([vec![record::encode(&hello).into()]]).await?;
    let garbage = || LinkError::Garbage("no answer to the first frame".into());
    let frame = rx.next().await?.ok_or_else(garbage)?;
    match record::decode::<HelloAnswer>(&frame).map_err(|_| garbage())? {
        HelloAnswer::Welcome { version } => Ok(Stream {
            connection,
            tx,
            rx,
            version,
        }),
        HelloAnswer::Refused { reason } => {
            connection.close("refused");
            Err(LinkError::Lost(format!("node {to} refuses this node: {reason}")))
        }
    }
}

/// Where the metadata says that a node's first shard listens.
fn registered(node: &Rc<Node>, to: i32) -> Option<String> {
    node.known_image().member(to).map(|m| m.address.clone())
}

/// Where a shard of a node may be reached: its first shard in several places by turns, the others where it has registered them.
fn address(node: &Rc<Node>, to: i32, shard: u32) -> Result<String, LinkError> {
    let found = match shard {
        0 => node.contacts.borrow().address(to, registered(node, to).as_deref()),
        _ => (node.known_image().broker(to))
            .and_then(|b| b.registration.peers.get(shard as usize))
            .map(|a| address::join(&a.host, a.port)),
    };
    found.ok_or_else(|| LinkError::Lost(format!("node {to} has not said yet where its shard {shard} listens")))
}

/// Where a node's first shard is tried next.
pub(super) async fn first_shard(node: &Rc<Node>, to: i32) -> Result<SocketAddr, LinkError> {
    resolve(&address(node, to, 0)?).await
}

pub(super) async fn resolve(text: &str) -> Result<SocketAddr, LinkError> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    // Names can take seconds to find: a thread of its own, as the executor's helper threads have the disk to serve.
    let (name, (tx, found)) = (text.to_owned(), flume::bounded(1));
    std::thread::Builder::new()
        .name("resolver".into())
        .spawn(move || tx.send(name.to_socket_addrs().map(|mut all| all.next())))
        .map_err(|error| LinkError::Lost(format!("{text}: no thread to look it up: {error}")))?;
    match found.into_recv_async().await.unwrap_or(Ok(None)) {
        Ok(Some(address)) => Ok(address),
        Ok(None) => Err(LinkError::Lost(format!("{text} has no address"))),
        Err(error) => Err(LinkError::Lost(format!("{text}: {error}"))),
    }
}
