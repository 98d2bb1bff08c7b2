//! quinn's runtime on a glommio executor. Everything stays on the executor's thread: quinn asks for `Send`, which is granted
//! by wrappers that panic on any other thread.
//!
//! glommio tells nobody when a UDP socket can be read. A one-byte peek through its TCP type does: it completes when a datagram is
//! there, and quinn-udp then takes all of them (kernel-notes.md).

use std::{
    cell::{Cell, RefCell},
    fmt,
    future::Future,
    io::{self, IoSliceMut},
    net::{SocketAddr, UdpSocket},
    os::fd::{FromRawFd, IntoRawFd},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use glommio::{net::TcpStream, timer::Timer};
use quinn::{
    AsyncTimer, AsyncUdpSocket, Runtime, UdpPoller,
    udp::{RecvMeta, Transmit, UdpSocketState},
};
use send_wrapper::SendWrapper;

/// How long a sender waits when the socket's buffer is full.
const SEND_RETRY: Duration = Duration::from_micros(200);
/// Bytes of one send with segmentation offload; more fails.
const GSO_BYTES_MAX: usize = 65_000;

/// The executor of the thread that made it.
#[derive(Debug)]
pub(super) struct GlommioRuntime {
    /// Largest datagram.
    pub mtu_max: u16,
}

impl Runtime for GlommioRuntime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        Box::pin(LazyTimer(SendWrapper::new(Armed { due: at, timer: None })))
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        glommio::spawn_local(future).detach();
    }

    fn wrap_udp_socket(&self, socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let state = UdpSocketState::new((&socket).into())?;
        let segments = state
            .max_gso_segments()
            .min(GSO_BYTES_MAX / usize::from(self.mtu_max))
            .max(1);
        Ok(Arc::new(Socket(SendWrapper::new(Rc::new(Inner {
            segments,
            readable: RefCell::new(Readable::new(&socket)?),
            blocked: Cell::new(false),
            state,
            socket,
        })))))
    }
}

struct Armed {
    due: Instant,
    /// Fires at that time, at or before `due`.
    timer: Option<(Instant, Timer)>,
}

/// quinn moves its timers with every packet; the executor's is moved only if it would fire too late, and armed again if it
/// fires too early.
struct LazyTimer(SendWrapper<Armed>);

impl fmt::Debug for LazyTimer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LazyTimer").finish_non_exhaustive()
    }
}

impl AsyncTimer for LazyTimer {
    fn reset(mut self: Pin<&mut Self>, at: Instant) {
        let armed = &mut *self.0;
        armed.due = at;
        armed.timer.take_if(|(fires, _)| *fires > at);
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let armed = &mut *self.0;
        loop {
            let now = Instant::now();
            if now >= armed.due {
                armed.timer = None;
                return Poll::Ready(());
            }
            let due = armed.due;
            let (_, timer) = armed
                .timer
                .get_or_insert_with(|| (due, Timer::new(due.saturating_duration_since(now))));
            ready!(Pin::new(timer).poll(cx));
            armed.timer = None;
        }
    }
}

type Peek = Pin<Box<dyn Future<Output = glommio::Result<usize, ()>>>>;

/// Says when a datagram is there.
struct Readable {
    stream: Rc<TcpStream>,
    peek: Option<Peek>,
}

impl Readable {
    fn new(socket: &UdpSocket) -> io::Result<Self> {
        let fd = socket.try_clone()?.into_raw_fd();
        Ok(Self {
            // SAFETY: the descriptor is a duplicate that nobody else owns: `into_raw_fd` gave it up. Nothing but `recv` with
            // MSG_PEEK is done with it, which a UDP socket takes as a TCP socket does.
            stream: Rc::new(unsafe { TcpStream::from_raw_fd(fd) }),
            peek: None,
        })
    }

    fn poll(&mut self, socket: &UdpSocket, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let stream = &self.stream;
        let peek = self.peek.get_or_insert_with(|| {
            let stream = Rc::clone(stream);
            Box::pin(async move { stream.peek(&mut [0; 1]).await })
        });
        let result = ready!(peek.as_mut().poll(cx));
        self.peek = None;
        match result {
            // To a TCP stream an empty datagram is its end, and it would be ready for ever.
            Ok(0) => *self = Self::new(socket)?,
            Ok(_) => {}
            Err(error) => return Poll::Ready(Err(error.into())),
        }
        Poll::Ready(Ok(()))
    }
}

struct Inner {
    socket: UdpSocket,
    state: UdpSocketState,
    readable: RefCell<Readable>,
    segments: usize,
    /// The last send found the socket's buffer full.
    blocked: Cell<bool>,
}

struct Socket(SendWrapper<Rc<Inner>>);

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket").finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        let inner = Rc::clone(&self.0);
        Box::pin(Writable(SendWrapper::new((inner, None))))
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let result = self.0.state.try_send((&self.0.socket).into(), transmit);
        let blocked = matches!(&result, Err(e) if e.kind() == io::ErrorKind::WouldBlock);
        self.0.blocked.set(blocked);
        match result {
            // Nobody listens there, or no way leads there: datagrams get lost, and QUIC knows.
            Err(e) if !blocked && e.kind() != io::ErrorKind::InvalidInput => {
                tracing::debug!(error = %e, to = %transmit.destination, "a datagram could not be sent");
                Ok(())
            }
            other => other,
        }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            match self.0.state.recv((&self.0.socket).into(), bufs, meta) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                other => return Poll::Ready(other),
            }
            ready!(self.0.readable.borrow_mut().poll(&self.0.socket, cx))?;
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.0.segments
    }

    fn max_receive_segments(&self) -> usize {
        self.0.state.gro_segments()
    }

    fn may_fragment(&self) -> bool {
        self.0.state.may_fragment()
    }
}

/// Ready, but for a moment after a send that found no room.
struct Writable(SendWrapper<(Rc<Inner>, Option<Timer>)>);

impl fmt::Debug for Writable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writable").finish_non_exhaustive()
    }
}

impl UdpPoller for Writable {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (inner, timer) = &mut *self.0;
        if inner.blocked.replace(false) && timer.is_none() {
            *timer = Some(Timer::new(SEND_RETRY));
        }
        if let Some(wait) = timer {
            ready!(Pin::new(wait).poll(cx));
            *timer = None;
        }
        Poll::Ready(Ok(()))
    }
}
