//! Peers that hang up are noticed at once, also while a request of theirs waits for something to happen and nothing is read from them:
//! their place among `max.connections`, and the memory of their request, are wanted by others.
//!
//! A thread of its own hears of it from the kernel (`EPOLLRDHUP`), whatever was sent before that and is not read yet. It only says so: a
//! wait that is for the peer's sake ends then ([`Hangup`]), and the connection goes on to its end as ever. What was asked for is still
//! done, and answered: a peer may have closed its own direction only.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    thread,
};

use atomic_waker::AtomicWaker;
use rustix::{
    buffer::spare_capacity,
    event::epoll::{self, CreateFlags, EventData, EventFlags},
};
use sharded_slab::Slab;

/// Hang-ups taken from the kernel at once.
const EVENTS_MAX: usize = 64;

/// Whether a peer has hung up, on any shard. One task at a time may wait for it: a connection waits for one request's sake.
#[derive(Default, Debug)]
pub struct Hangup {
    happened: AtomicBool,
    waiting: AtomicWaker,
}

impl Hangup {
    fn say(&self) {
        self.happened.store(true, Ordering::Release);
        self.waiting.wake();
    }

    /// Ready once the peer has hung up.
    pub fn poll(&self, cx: &Context<'_>) -> Poll<()> {
        self.waiting.register(cx.waker());
        if self.happened.load(Ordering::Acquire) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }

    /// Waits until the peer hangs up.
    pub async fn wait(&self) {
        std::future::poll_fn(|cx| self.poll(cx)).await;
    }
}

/// The connections of all shards.
#[derive(Debug)]
pub struct Hangups {
    epoll: OwnedFd,
    watched: Slab<Arc<Hangup>>,
}

/// A connection is watched for as long as this is kept.
pub struct Watch {
    all: Arc<Hangups>,
    key: Option<usize>,
    /// What is said of it.
    pub hangup: Arc<Hangup>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.all.watched.remove(key);
        }
    }
}

impl Hangups {
    /// Starts the thread, which ends with the process.
    ///
    /// # Errors
    /// What the system says if there can be none.
    pub fn start() -> io::Result<Arc<Self>> {
        let all = Arc::new(Self {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            watched: Slab::new(),
        });
        let listening = Arc::clone(&all);
        thread::Builder::new().name("hang-ups".into()).spawn(move || {
            let mut events = Vec::with_capacity(EVENTS_MAX);
            loop {
                match epoll::wait(&listening.epoll, spare_capacity(&mut events), None) {
                    Ok(_) => {}
                    Err(rustix::io::Errno::INTR) => continue,
                    Err(error) => {
                        tracing::error!(%error, "nobody is told any more that a client has hung up: its requests wait to their end");
                        return;
                    }
                }
                for event in events.drain(..) {
                    // Who is not there any more has noticed itself.
                    if let Some(hangup) = listening.watched.get(event.data.u64() as usize) {
                        hangup.say();
                    }
                }
            }
        })?;
        Ok(all)
    }

    /// Watches a connection, once. The kernel forgets it when it is closed.
    pub fn watch(self: &Arc<Self>, socket: BorrowedFd<'_>) -> Watch {
        let hangup = Arc::new(Hangup::default());
        let key = self.watched.insert(Arc::clone(&hangup));
        let watch = Watch {
            all: Arc::clone(self),
            key,
            hangup,
        };
        if let Some(key) = key {
            let data = EventData::new_u64(key as u64);
            let once = EventFlags::RDHUP | EventFlags::ET | EventFlags::ONESHOT;
            if let Err(error) = epoll::add(&self.epoll, socket, data, once) {
                tracing::debug!(%error, "a connection is not watched: its requests wait to their end");
            }
        }
        watch
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        net::{Shutdown, TcpListener, TcpStream},
        os::fd::AsFd,
        time::Duration,
    };

    use super::*;

    fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        (client, listener.accept().expect("accepted").0)
    }

    fn has_happened(hangup: &Hangup) -> bool {
        (0..200).any(|_| {
            thread::sleep(Duration::from_millis(5));
            hangup.happened.load(Ordering::Acquire)
        })
    }

    #[test]
    fn a_peer_that_hangs_up_is_noticed_whatever_it_has_sent_before() {
        let all = Hangups::start().expect("a thread");
        let (mut gone, server) = connected();
        let (half, half_server) = connected();
        let (stays, stays_server) = connected();
        let watched = [&server, &half_server, &stays_server].map(|s| all.watch(s.as_fd()));
        gone.write_all(&[1; 100_000]).expect("sent");
        assert!(!has_happened(&watched[0].hangup));
        drop(gone);
        half.shutdown(Shutdown::Write).expect("open");
        assert!(has_happened(&watched[0].hangup) && has_happened(&watched[1].hangup));
        futures_lite::future::block_on(watched[0].hangup.wait());
        assert!(!watched[2].hangup.happened.load(Ordering::Acquire));
        drop(stays);
        assert!(has_happened(&watched[2].hangup));
    }
}
