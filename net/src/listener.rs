//! TCP on glommio: frames in, responses out, one task per connection and one per shard for accepting.

use std::{
    io,
    net::SocketAddr,
    os::fd::{FromRawFd, IntoRawFd},
};

use bytes::{Bytes, BytesMut};
use futures_lite::{AsyncReadExt, AsyncWriteExt, io::WriteHalf};
use glommio::net::{TcpListener, TcpStream};

use socket2::{Domain, Protocol, Socket, Type};

use crate::kafka::frame;

/// Connections that the kernel completes before they are accepted.
const BACKLOG: i32 = 1024;

/// A listening socket of one shard; every shard binds the same address (SO_REUSEPORT) and the kernel spreads
/// connections over them.
pub struct Listener(TcpListener);

impl Listener {
    /// Binds. SO_REUSEADDR beside SO_REUSEPORT, which glommio's own `bind` does not set: without it connections of a
    /// killed broker that linger in TIME_WAIT keep the next one from its port.
    ///
    /// # Errors
    /// What the system says, for example that the address is in use.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        // SAFETY: the descriptor is a listening TCP socket that nobody else owns: `into_raw_fd` gave it up.
        // glommio has no safe way to take a socket with options of our own.
        Ok(Self(unsafe { TcpListener::from_raw_fd(socket.into_raw_fd()) }))
    }

    /// The address bound, with the port the system picked if 0 was asked for.
    ///
    /// # Errors
    /// What the system says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr().map_err(io::Error::from)
    }

    /// The next connection, without Nagle's delay.
    ///
    /// # Errors
    /// What the system says, for example that no more files can be opened.
    pub async fn accept(&self) -> io::Result<TcpStream> {
        let stream = self.0.accept().await.map_err(io::Error::from)?;
        stream.set_nodelay(true).map_err(io::Error::from)?;
        Ok(stream)
    }
}

/// Where responses go.
pub type Writer = WriteHalf<TcpStream>;

/// The receiving half of a connection.
pub struct FrameReader<R> {
    stream: R,
    buffer: BytesMut,
    limit: usize,
}

/// Bytes asked of the socket at once: a few small requests, and little memory for an idle connection.
const READ_BYTES: usize = 4 << 10;

impl<R: futures_lite::AsyncRead + Unpin> FrameReader<R> {
    /// Reads frames of at most `limit` bytes.
    pub fn new(stream: R, limit: usize) -> Self {
        Self {
            stream,
            buffer: BytesMut::new(),
            limit,
        }
    }

    /// Waits for the length of the next frame; `None` when the peer has closed.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] for a length that no frame may have; the connection's errors.
    pub async fn next_length(&mut self) -> io::Result<Option<usize>> {
        while self.buffer.len() < 4 {
            if self.fill(READ_BYTES).await? == 0 {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
        }
        let prefix = [self.buffer[0], self.buffer[1], self.buffer[2], self.buffer[3]];
        frame::length(prefix, self.limit)
            .map(Some)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
    }

    /// Reads the frame whose length [`next_length`](Self::next_length) gave.
    ///
    /// # Errors
    /// The connection's errors.
    pub async fn frame(&mut self, length: usize) -> io::Result<Bytes> {
        let total = length + 4;
        // A stated length is paid for as its bytes arrive, not in advance.
        while self.buffer.len() < total {
            let want = (total - self.buffer.len()).clamp(READ_BYTES, 1 << 20);
            if self.fill(want).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let mut frame = self.buffer.split_to(total);
        if self.buffer.is_empty() {
            self.buffer = BytesMut::new();
        }
        let _ = frame.split_to(4);
        Ok(frame.freeze())
    }

    async fn fill(&mut self, want: usize) -> io::Result<usize> {
        let have = self.buffer.len();
        self.buffer.resize(have + want, 0);
        let result = self.stream.read(&mut self.buffer[have..]).await;
        self.buffer.truncate(have + *result.as_ref().unwrap_or(&0));
        result
    }
}

/// Splits a connection.
pub fn split(stream: TcpStream, limit: usize) -> (FrameReader<futures_lite::io::ReadHalf<TcpStream>>, Writer) {
    let (read, write) = futures_lite::io::split(stream);
    (FrameReader::new(read, limit), write)
}

/// Sends bytes.
///
/// # Errors
/// The connection's errors.
pub async fn send(writer: &mut Writer, bytes: &[u8]) -> io::Result<()> {
    writer.write_all(bytes).await
}
