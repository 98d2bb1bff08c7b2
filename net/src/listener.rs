//! TCP on glommio: frames in, responses out, one task per connection and one per shard for accepting.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    net::SocketAddr,
    ops::Range,
    os::fd::{AsRawFd, FromRawFd, IntoRawFd},
    rc::Rc,
};

use bytes::{Buf, Bytes, BytesMut};
use futures_lite::{AsyncReadExt, AsyncWriteExt, io::WriteHalf};
use glommio::net::{TcpListener, TcpStream};

use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::{kafka::frame, traffic::Traffic};

/// Connections that the kernel completes before they are accepted.
const BACKLOG: i32 = 1024;

/// Binds a socket that will listen, and refuses connections until it does. Several may bind one address (SO_REUSEPORT): the kernel spreads connections over them.
/// SO_REUSEADDR beside it, which glommio's own `bind` does not set: without it connections of a killed broker that linger in
/// TIME_WAIT keep the next one from its port.
///
/// # Errors
/// What the system says, for example that the address is in use.
pub fn reserve(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// Lets connections come; they wait until they are accepted.
///
/// # Errors
/// What the system says.
pub fn listen(reserved: &std::net::TcpListener) -> io::Result<()> {
    SockRef::from(reserved).listen(BACKLOG)
}

/// Binds a listening socket, as [`reserve`] does.
///
/// # Errors
/// What the system says.
pub fn bind(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = reserve(address)?;
    listen(&socket)?;
    Ok(socket)
}

/// A listening socket of one shard.
pub struct Listener(TcpListener);

impl From<std::net::TcpListener> for Listener {
    /// Takes a bound socket to this thread's executor.
    fn from(socket: std::net::TcpListener) -> Self {
        // SAFETY: the descriptor is a listening TCP socket that nobody else owns: `into_raw_fd` gave it up.
        // glommio has no safe way to take a socket with options of our own.
        Self(unsafe { TcpListener::from_raw_fd(socket.into_raw_fd()) })
    }
}

impl Listener {
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

/// The receiving half of a connection: one buffer that is read into again and again. A frame is copied out of it, or, if it
/// is large, read into memory of exactly its size, so that what is kept of a request never keeps more than the request.
pub struct FrameReader<R> {
    stream: R,
    buffer: Vec<u8>,
    /// Bytes of the buffer that hold something not handed out yet.
    filled: Range<usize>,
    /// Reads in a row that needed no more than the smallest buffer.
    small_reads: u32,
    limit: usize,
    traffic: Rc<Traffic>,
}

/// Bytes asked of the socket at once while little comes; what an idle connection keeps.
const READ_BYTES_MIN: usize = 4 << 10;
/// The same while much comes.
const READ_BYTES_MAX: usize = 64 << 10;
/// Small reads after which a grown buffer is given back.
const SMALL_READS: u32 = 64;
/// Frames longer than this get memory of their own.
const LARGE_FRAME: usize = 8 << 10;
/// Memory for a frame of which less has come; from there on it doubles.
const TRUSTED: usize = 64 << 10;
/// The same where there is plenty: most large frames are read into memory that need not grow.
const FORESEEN: usize = 1 << 20;

impl<R: futures_lite::AsyncRead + Unpin> FrameReader<R> {
    /// What comes and goes over its connection.
    #[must_use]
    pub fn traffic(&self) -> &Rc<Traffic> {
        &self.traffic
    }

    /// Reads frames of at most `limit` bytes.
    pub fn new(stream: R, limit: usize) -> Self {
        Self {
            stream,
            buffer: vec![0; READ_BYTES_MIN],
            filled: 0..0,
            small_reads: 0,
            limit,
            traffic: Rc::default(),
        }
    }

    /// Waits for the length of the next frame; `None` when the peer has closed.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] for a length that no frame may have; the connection's errors.
    pub async fn next_length(&mut self) -> io::Result<Option<usize>> {
        loop {
            if let Some(prefix) = self.buffer[self.filled.clone()].first_chunk() {
                return frame::length(*prefix, self.limit)
                    .map(Some)
                    .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e));
            }
            self.traffic.set_receives(!self.filled.is_empty());
            if self.fill().await? == 0 {
                return if self.filled.is_empty() {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
        }
    }

    /// Reads the frame whose length [`next_length`](Self::next_length) gave. `room` is waited for before the frame takes memory of its own:
    /// asked for so many bytes in all, not many times what has come of it, and how many would be of use, it says how many there are.
    ///
    /// # Errors
    /// The connection's errors.
    pub async fn frame(
        &mut self,
        length: usize,
        mut room: impl AsyncFnMut(usize, usize) -> usize,
    ) -> io::Result<Bytes> {
        self.filled.start += 4;
        self.traffic.set_receives(true);
        if length > LARGE_FRAME && self.filled.len() < length {
            return self.large_frame(length, room).await;
        }
        while self.filled.len() < length {
            if self.fill().await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        self.traffic.set_receives(false);
        room(length, length).await;
        let begin = self.filled.start;
        self.filled.start += length;
        Ok(Bytes::copy_from_slice(&self.buffer[begin..begin + length]))
    }

    async fn large_frame(
        &mut self,
        length: usize,
        mut room: impl AsyncFnMut(usize, usize) -> usize,
    ) -> io::Result<Bytes> {
        let mut have = self.filled.len();
        let mut frame = BytesMut::zeroed(self.wait_for_room(&mut room, have, length).await);
        frame[..have].copy_from_slice(&self.buffer[self.filled.clone()]);
        self.filled = 0..0;
        while have < length {
            if have == frame.len() {
                frame.resize(self.wait_for_room(&mut room, have, length).await, 0);
            }
            match self.stream.read(&mut frame[have..]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => {
                    have += read;
                    self.traffic.passed(read);
                }
            }
        }
        self.traffic.set_receives(false);
        Ok(frame.freeze())
    }

    /// Waits for memory for a frame of which `have` bytes have come; the peer is not waited for meanwhile.
    async fn wait_for_room(
        &self,
        room: &mut impl AsyncFnMut(usize, usize) -> usize,
        have: usize,
        length: usize,
    ) -> usize {
        let needed = length.min(TRUSTED.max(have * 2));
        let useful = length.min(FORESEEN.max(needed));
        self.traffic.set_receives(false);
        let given = room(needed, useful).await;
        self.traffic.set_receives(true);
        given.clamp(needed, useful)
    }

    async fn fill(&mut self) -> io::Result<usize> {
        if self.filled.is_empty() {
            self.filled = 0..0;
            if self.small_reads >= SMALL_READS && self.buffer.len() > READ_BYTES_MIN {
                self.buffer = vec![0; READ_BYTES_MIN];
            }
        } else if self.filled.start > 0 {
            self.buffer.copy_within(self.filled.clone(), 0);
            self.filled = 0..self.filled.len();
        }
        if self.filled.end == self.buffer.len() {
            self.buffer.resize(self.buffer.len() * 2, 0);
        }
        let read = self.stream.read(&mut self.buffer[self.filled.end..]).await?;
        self.traffic.passed(read);
        self.filled.end += read;
        self.small_reads = if read <= READ_BYTES_MIN {
            self.small_reads + 1
        } else {
            0
        };
        if self.filled.end == self.buffer.len() && self.buffer.len() < READ_BYTES_MAX {
            self.buffer.resize(self.buffer.len() * 2, 0);
        }
        Ok(read)
    }
}

/// Where responses go.
pub struct Writer {
    half: WriteHalf<TcpStream>,
    traffic: Rc<Traffic>,
}

/// Pieces named to the kernel at once; more are sent by further calls.
const PIECES_AT_ONCE: usize = 32;

impl Writer {
    /// Sends bytes.
    ///
    /// # Errors
    /// The connection's errors.
    pub async fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        self.traffic.set_sends(true);
        while !bytes.is_empty() {
            let sent = self.half.write(bytes).await?;
            bytes = &bytes[self.sent(sent)?..];
        }
        self.traffic.set_sends(false);
        Ok(())
    }

    /// Notes what the connection took, which is something.
    fn sent(&self, sent: usize) -> io::Result<usize> {
        if sent == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.traffic.passed(sent);
        Ok(sent)
    }

    /// Sends pieces one after the other, without putting them together first.
    ///
    /// # Errors
    /// The connection's errors.
    pub async fn send_pieces(&mut self, mut pieces: VecDeque<Bytes>) -> io::Result<()> {
        self.traffic.set_sends(true);
        while let Some(first) = pieces.front() {
            let sent = match self.send_some(&pieces) {
                // The executor waits until there is room, and sends something.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.half.write(first).await?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                sent => sent?,
            };
            advance(&mut pieces, self.sent(sent)?);
        }
        self.traffic.set_sends(false);
        Ok(())
    }

    fn send_some(&self, pieces: &VecDeque<Bytes>) -> io::Result<usize> {
        let mut slices = [IoSlice::new(&[]); PIECES_AT_ONCE];
        let count = pieces.len().min(PIECES_AT_ONCE);
        for (slice, piece) in slices.iter_mut().zip(pieces) {
            *slice = IoSlice::new(piece);
        }
        let socket = self.traffic.socket().expect("a writer's stream is a socket");
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(sendmsg(
            socket,
            &slices[..count],
            &mut SendAncillaryBuffer::default(),
            flags,
        )?)
    }

    /// Closes the sending side; the peer may have gone first.
    pub async fn close(&mut self) {
        let _ = self.half.close().await;
    }
}

/// Takes away what was sent.
fn advance(pieces: &mut VecDeque<Bytes>, mut sent: usize) {
    while let Some(first) = pieces.front_mut() {
        if sent < first.len() {
            first.advance(sent);
            return;
        }
        sent -= first.len();
        pieces.pop_front();
    }
}

/// Splits a connection.
pub fn split(stream: TcpStream, limit: usize) -> (FrameReader<futures_lite::io::ReadHalf<TcpStream>>, Writer) {
    let traffic = Rc::new(Traffic::of(stream.as_raw_fd()));
    let (read, half) = futures_lite::io::split(stream);
    let mut reader = FrameReader::new(read, limit);
    reader.traffic = Rc::clone(&traffic);
    (reader, Writer { half, traffic })
}

#[cfg(test)]
mod tests {
    use std::{
        pin::Pin,
        task::{Context, Poll},
    };

    use proptest::prelude::*;

    use super::*;

    /// Gives its bytes in pieces, as a socket may.
    struct Pieces {
        bytes: Vec<u8>,
        at: usize,
        lengths: Vec<usize>,
        reads: usize,
    }

    impl futures_lite::AsyncRead for Pieces {
        fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
            let wanted = self.lengths[self.reads % self.lengths.len()];
            let len = wanted.min(buffer.len()).min(self.bytes.len() - self.at);
            buffer[..len].copy_from_slice(&self.bytes[self.at..self.at + len]);
            self.at += len;
            self.reads += 1;
            Poll::Ready(Ok(len))
        }
    }

    fn pieces(frames: &[Vec<u8>], lengths: Vec<usize>) -> Pieces {
        let bytes = frames
            .iter()
            .flat_map(|f| (f.len() as u32).to_be_bytes().into_iter().chain(f.iter().copied()))
            .collect();
        Pieces {
            bytes,
            at: 0,
            lengths,
            reads: 0,
        }
    }

    proptest! {
        #[test]
        fn frames_come_out_whole_however_they_arrive(
            sizes in prop::collection::vec(
                prop_oneof![0_usize..50, 0_usize..10_000, Just(LARGE_FRAME), Just(LARGE_FRAME + 1), 0_usize..3_000_000],
                1..12,
            ),
            lengths in prop::collection::vec(prop_oneof![1_usize..9, 1_usize..5_000, Just(1 << 20)], 1..8),
            cut in 1_usize..20,
            plenty in any::<bool>(),
        ) {
            // Byte by byte is for small frames.
            let cap = if lengths.iter().all(|l| *l < 9) { 20_000 } else { 3_000_000 };
            let frames: Vec<Vec<u8>> = sizes
                .iter()
                .enumerate()
                .map(|(n, size)| (0..*size.min(&cap)).map(|i| (i + n) as u8).collect())
                .collect();
            futures_lite::future::block_on(async {
                let mut reader = FrameReader::new(pieces(&frames, lengths.clone()), 4_000_000);
                for frame in &frames {
                    let length = reader.next_length().await.expect("a good length").expect("a frame");
                    let mut paid = 0;
                    let room = async |needed: usize, useful: usize| {
                        assert!(needed >= paid && needed <= (2 * paid).max(2 * READ_BYTES_MAX) && useful <= length);
                        paid = if plenty { useful } else { needed };
                        paid
                    };
                    prop_assert_eq!(&reader.frame(length, room).await.expect("a frame")[..], &frame[..]);
                    prop_assert_eq!(paid, length);
                }
                prop_assert_eq!(reader.next_length().await.expect("the end"), None);
                // A stream that ends inside a frame is an error, not an end.
                let mut short = pieces(&frames, lengths);
                let len = short.bytes.len();
                short.bytes.truncate(len - cut.min(frames.last().map_or(0, Vec::len) + 3));
                let mut reader = FrameReader::new(short, 4_000_000);
                let mut last = Ok(0);
                loop {
                    match reader.next_length().await {
                        Ok(Some(length)) => match reader.frame(length, async |needed, _| needed).await {
                            Ok(frame) => last = Ok(frame.len()),
                            Err(e) => last = Err(e.kind()),
                        },
                        Ok(None) => break,
                        Err(e) => last = Err(e.kind()),
                    }
                    if last.is_err() {
                        break;
                    }
                }
                prop_assert_eq!(last, Err(io::ErrorKind::UnexpectedEof));
                Ok(())
            })?;
        }
    }
}
