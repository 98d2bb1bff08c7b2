//! A UDP port of one shard, and connections to and from other nodes on it.

use std::{
    cell::Cell,
    io,
    net::{SocketAddr, UdpSocket},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use quinn::{
    ConnectionError, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, TransportErrorCode, VarInt,
    rustls::pki_types::CertificateDer,
};
use socket2::{Domain, Protocol, Socket, Type};
use thiserror::Error;

use super::{
    runtime::GlommioRuntime,
    stream::{FrameReceiver, FrameSender},
    tls::{self, Credentials, TlsError},
};

/// Datagrams of this size at the most, where the path takes them (jumbo frames, loopback).
const MTU_MAX: u16 = 8952;
/// Bytes of datagrams that the kernel holds for us each way.
const SOCKET_BUFFER: usize = 4 << 20;
/// Silence after which a connection counts as lost.
const IDLE: Duration = Duration::from_secs(3);
/// Sign of life on a connection that carries nothing.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// Bytes that a peer may send on one stream before we have taken them.
const STREAM_WINDOW: u32 = 8 << 20;
/// Bytes that a peer may send on a connection before we have taken them.
const CONNECTION_WINDOW: u32 = 32 << 20;
/// Streams that a peer may have open at once.
const STREAMS_MAX: u32 = 256;
/// Handshakes that wait to be accepted; further ones are refused.
const INCOMING_MAX: usize = 256;
/// Handshakes at once; further ones are refused.
const HANDSHAKES_MAX: usize = 128;
/// So many at once may come from addresses that have not shown yet that they get our answers (RFC 9000, 8.1.2).
const UNPROVEN_MAX: usize = 32;

/// Why there is no connection.
#[derive(Debug, Error)]
pub enum LinkError {
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The address.
    #[error("{address} cannot be reached: {reason}")]
    Connect {
        /// Where.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
    /// Who wanted a connection has left or fallen silent before the handshake was done.
    #[error("{address} gave its connection up: {reason}")]
    GaveUp {
        /// Who.
        address: SocketAddr,
        /// What was seen of it.
        reason: String,
    },
    /// It was there, and is lost.
    #[error("the connection is lost: {0}")]
    Lost(String),
    /// The peer sent something that cannot be.
    #[error("the peer sent {0}")]
    Garbage(String),
}

impl From<ConnectionError> for LinkError {
    fn from(error: ConnectionError) -> Self {
        Self::Lost(error.to_string())
    }
}

/// Binds a UDP port for an endpoint.
///
/// # Errors
/// What the system says, for example that the port is in use.
pub fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    // More than the host allows is cut by the kernel.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(MTU_MAX);
    transport
        .max_idle_timeout(Some(IdleTimeout::try_from(IDLE).expect("seconds fit")))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
        .send_window(u64::from(CONNECTION_WINDOW))
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_MAX))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .mtu_discovery_config(Some(mtu));
    transport
}

/// One shard's port. Lives on the executor that made it.
pub struct Endpoint {
    quinn: quinn::Endpoint,
    handshakes: Rc<Cell<usize>>,
}

impl Endpoint {
    /// Takes a bound port to this thread's executor.
    ///
    /// # Errors
    /// [`LinkError::Tls`] for certificates, [`LinkError::Connect`] if the system refuses.
    pub fn new(socket: UdpSocket, credentials: &Credentials) -> Result<Self, LinkError> {
        let transport = Arc::new(transport());
        let mut server = credentials.server()?;
        server
            .transport_config(Arc::clone(&transport))
            .max_incoming(INCOMING_MAX);
        let mut client = credentials.client()?;
        client.transport_config(transport);
        let address = socket.local_addr().unwrap_or_else(|_| ([0, 0, 0, 0], 0).into());
        let failed = |reason: String| LinkError::Connect { address, reason };
        let mut config = EndpointConfig::default();
        config
            .max_udp_payload_size(MTU_MAX)
            .map_err(|e| failed(e.to_string()))?;
        let runtime = GlommioRuntime { mtu_max: MTU_MAX };
        let mut endpoint =
            quinn::Endpoint::new(config, Some(server), socket, Arc::new(runtime)).map_err(|e| failed(e.to_string()))?;
        endpoint.set_default_client_config(client);
        Ok(Self {
            quinn: endpoint,
            handshakes: Rc::default(),
        })
    }

    /// Connects to a node; its certificate must be made out to it.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn connect(&self, address: SocketAddr, node: i32) -> Result<Connection, LinkError> {
        let failed = |reason: String| LinkError::Connect { address, reason };
        let connecting = self
            .quinn
            .connect(address, &tls::node_name(node))
            .map_err(|e| failed(e.to_string()))?;
        connecting.await.map(Connection).map_err(|e| failed(e.to_string()))
    }

    /// The next handshake; `None` once the endpoint is closed. It goes on while it is awaited: to be done beside others, since
    /// who began it may be silent from now on.
    pub async fn accept(&self) -> Option<Handshake> {
        loop {
            let incoming = self.quinn.accept().await?;
            let running = self.handshakes.get();
            if running >= HANDSHAKES_MAX {
                incoming.refuse();
            } else if running >= UNPROVEN_MAX && incoming.may_retry() {
                incoming.retry().expect("it may be asked to");
            } else {
                self.handshakes.set(running + 1);
                return Some(Handshake {
                    incoming,
                    _counted: Counted(Rc::clone(&self.handshakes)),
                });
            }
        }
    }

    /// Closes all connections and waits until the peers were told.
    pub async fn close(&self) {
        self.quinn.close(VarInt::from_u32(0), b"stopping");
        self.quinn.wait_idle().await;
    }
}

/// One of the handshakes at once, as long as it is there.
struct Counted(Rc<Cell<usize>>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// Somebody who wants a connection.
pub struct Handshake {
    incoming: quinn::Incoming,
    _counted: Counted,
}

impl Handshake {
    /// The connection, once both have shown their certificates.
    ///
    /// # Errors
    /// [`LinkError::GaveUp`] if the other did, [`LinkError::Connect`] if a certificate does not hold, or what came is no handshake.
    pub async fn finish(self) -> Result<Connection, LinkError> {
        let address = self.incoming.remote_address();
        let done = match self.incoming.accept() {
            Ok(connecting) => connecting.await,
            Err(error) => Err(error),
        };
        done.map(Connection).map_err(|error| {
            let reason = error.to_string();
            match error {
                ConnectionError::TimedOut => LinkError::GaveUp { address, reason },
                // What is closed by its owner before the handshake is done says so by this code (RFC 9000, 10.2.3).
                ConnectionError::ConnectionClosed(close)
                    if close.error_code == TransportErrorCode::APPLICATION_ERROR =>
                {
                    LinkError::GaveUp { address, reason }
                }
                _ => LinkError::Connect { address, reason },
            }
        })
    }
}

/// A connection to another node's shard; clones are the same connection.
#[derive(Clone)]
pub struct Connection(quinn::Connection);

impl Connection {
    /// Whether the peer's certificate is made out to a node.
    #[must_use]
    pub fn is_node(&self, node: i32) -> bool {
        let identity = self.0.peer_identity();
        let chain = identity.and_then(|i| i.downcast::<Vec<CertificateDer<'static>>>().ok());
        chain.is_some_and(|chain| tls::names_node(&chain, node))
    }

    /// The peer's address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.0.remote_address()
    }

    /// Opens a stream of frames both ways. The peer sees it with the first frame.
    ///
    /// # Errors
    /// [`LinkError::Lost`].
    pub async fn open(&self, frame_max: usize) -> Result<(FrameSender, FrameReceiver), LinkError> {
        let (send, receive) = self.0.open_bi().await?;
        Ok((FrameSender::new(send), FrameReceiver::new(receive, frame_max)))
    }

    /// The next stream that the peer opens.
    ///
    /// # Errors
    /// [`LinkError::Lost`].
    pub async fn accept(&self, frame_max: usize) -> Result<(FrameSender, FrameReceiver), LinkError> {
        let (send, receive) = self.0.accept_bi().await?;
        Ok((FrameSender::new(send), FrameReceiver::new(receive, frame_max)))
    }

    /// Ends the connection and tells the peer why.
    pub fn close(&self, reason: &str) {
        self.0.close(VarInt::from_u32(1), reason.as_bytes());
    }
}
