//! Which addresses are bound, and what is told to clients of them.

use std::{
    io,
    net::{SocketAddr, TcpListener, ToSocketAddrs},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use millrace_engine::host::Host;
use millrace_net::listener::{self, Listener};
use thiserror::Error;

use crate::{address, config::Settings, endpoints::Endpoints, kafka::connection, node::Node};

/// An address that cannot be used; the text says what to do.
#[derive(Debug, Error)]
#[error("cannot listen on {address}: {reason}")]
pub struct ListenError {
    /// As configured, or as made from that.
    pub address: String,
    /// Why, and what to do.
    pub reason: String,
}

impl ListenError {
    fn new(address: impl ToString, reason: impl ToString) -> Self {
        Self {
            address: address.to_string(),
            reason: reason.to_string(),
        }
    }
}

/// The address to bind.
///
/// # Errors
/// Not an address, or one that clients cannot be told.
pub fn resolve(settings: &Settings) -> Result<SocketAddr, ListenError> {
    let configured = settings.get("kafka.listen");
    address::split(configured).map_err(|e| ListenError::new(configured, e))?;
    let listen = configured
        .to_socket_addrs()
        .map_err(|e| ListenError::new(configured, format!("{e}; write HOST:PORT, for example 127.0.0.1:9092")))?
        .next()
        .ok_or_else(|| ListenError::new(configured, "the name has no address"))?;
    let advertise = settings.get("advertise");
    if advertise.is_empty() && listen.ip().is_unspecified() {
        return Err(ListenError::new(
            configured,
            "clients cannot connect to an unspecified address: say with --advertise HOST:PORT, or advertised.listeners, which one \
             to tell them",
        ));
    }
    if !advertise.is_empty() && address::split_told(advertise).is_err() {
        return Err(ListenError::new(
            advertise,
            "--advertise takes HOST:PORT, both as clients are to use them, for example broker-1.example.org:9092 or \
             [2001:db8::1]:9092",
        ));
    }
    Ok(listen)
}

/// What is said if somebody else listens on an address.
fn in_use(address: SocketAddr) -> impl FnOnce(io::Error) -> ListenError {
    move |e| {
        let what_to_do = "stop what listens there, or choose another with --kafka-listen HOST:PORT";
        ListenError::new(address, format!("{e}; {what_to_do}"))
    }
}

/// Binds `count` sockets to an address of which this broker shall be the only user.
fn bind(address: SocketAddr, count: usize) -> Result<(Vec<TcpListener>, SocketAddr), ListenError> {
    let fail = |e: io::Error| ListenError::new(address, e);
    // SO_REUSEPORT would let a second broker of this user listen there unnoticed.
    address::bind_patiently(|| TcpListener::bind(address)).map_err(in_use(address))?;
    let first = listener::reserve(address).map_err(fail)?;
    let bound = first.local_addr().map_err(fail)?;
    let mut all = vec![first];
    for _ in 1..count {
        all.push(listener::reserve(bound).map_err(fail)?);
    }
    Ok((all, bound))
}

/// What is bound: sockets of each shard, and what is told of them.
pub struct Bound {
    sockets: Vec<Vec<TcpListener>>,
    /// Told to clients.
    pub endpoints: Arc<Endpoints>,
    /// For clients to begin with.
    pub address: String,
}

impl Bound {
    /// From here on clients that come wait until [`accept`] is called; before they are refused, and try other brokers.
    ///
    /// # Errors
    /// Another process listens there meanwhile.
    pub fn listen(&self) -> Result<(), ListenError> {
        let all = || self.sockets.iter().flatten();
        let mut addresses = Vec::new();
        for socket in all() {
            let address = (socket.local_addr()).map_err(|e| ListenError::new(&self.address, e))?;
            if !addresses.contains(&address) {
                TcpListener::bind(address).map_err(in_use(address))?;
                addresses.push(address);
            }
        }
        for socket in all() {
            listener::listen(socket).map_err(|e| ListenError::new(&self.address, e))?;
        }
        Ok(())
    }
}

/// Binds the Kafka port for every shard, and with `core.endpoints` a port for each shard alone: those that follow.
///
/// # Errors
/// An address is in use, or cannot be bound.
pub fn bind_all(settings: &Settings, node_id: i32, shards: usize, address: SocketAddr) -> Result<Bound, ListenError> {
    let (sockets, bound) = bind(address, shards)?;
    let mut sockets: Vec<Vec<TcpListener>> = sockets.into_iter().map(|s| vec![s]).collect();
    let advertised = address::split_told(settings.get("advertise"));
    let mapped = advertised.is_ok();
    let (host, port) = advertised.map_or_else(
        |_| (bound.ip().to_string(), bound.port()),
        |(host, port)| (host.to_owned(), port),
    );
    let endpoints = if settings.flag("core.endpoints") {
        if let Some(reason) = Endpoints::refuse_ids(node_id, shards) {
            return Err(ListenError::new(bound, reason));
        }
        let mut told = Vec::with_capacity(shards);
        for (shard, of_shard) in sockets.iter_mut().enumerate() {
            let behind = |port: u16| {
                u16::try_from(usize::from(port) + 1 + shard)
                    .map_err(|_| ListenError::new(bound, "core.endpoints takes a port for each core behind this one"))
            };
            // Any port means any ports.
            let wanted = if address.port() == 0 {
                0
            } else {
                behind(address.port())?
            };
            let (own, own_bound) = bind(SocketAddr::new(bound.ip(), wanted), 1)?;
            of_shard.extend(own);
            told.push(if mapped { behind(port)? } else { own_bound.port() });
        }
        Endpoints::per_core(node_id, &host, &told)
    } else {
        Endpoints::one(node_id, host.clone(), port)
    };
    Ok(Bound {
        sockets,
        endpoints: Arc::new(endpoints),
        address: address::join(&host, port),
    })
}

/// Lets clients in, on every shard.
///
/// # Errors
/// A shard is gone.
pub async fn accept(node: &Rc<Node>, bound: Bound) -> Result<(), ListenError> {
    for (shard, sockets) in bound.sockets.into_iter().enumerate() {
        let endpoints = Arc::clone(&bound.endpoints);
        let accepting = node.router.call(node, shard, move |n| async move {
            *n.endpoints.borrow_mut() = endpoints;
            // The first one is everybody's.
            for (index, socket) in sockets.into_iter().enumerate() {
                spawn_accept(&n, socket.into(), index > 0);
            }
        });
        accepting.await.map_err(|e| ListenError::new(&bound.address, e))?;
    }
    Ok(())
}

fn spawn_accept(node: &Rc<Node>, listener: Listener, to_core: bool) {
    let node = Rc::clone(node);
    glommio::spawn_local(async move {
        while !node.is_stopping() {
            let stopped = async {
                node.stop.wait(|| node.is_stopping().then_some(())).await;
                None
            };
            let accepted = futures_lite::future::or(async { Some(listener.accept().await) }, stopped).await;
            match accepted {
                None => return,
                Some(Ok(stream)) => {
                    glommio::spawn_local(connection::serve(Rc::clone(&node), stream, to_core)).detach();
                }
                Some(Err(error)) => {
                    // The next one may do better.
                    if let Some(before) = node.refusals.say() {
                        tracing::warn!(%error, before, "a connection could not be accepted");
                    }
                    node.host.sleep(Duration::from_millis(50)).await;
                }
            }
        }
    })
    .detach();
}
