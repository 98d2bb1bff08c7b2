//! Carries the quorum's messages to one other member. Raft lives with lost messages, so what cannot be sent soon is dropped.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    rc::Rc,
    time::Duration,
};

use bytes::Bytes;
use millrace_cluster::peer::StreamKind;
use millrace_engine::{host::Host, sync::WaitList};
use millrace_net::quic::LinkError;

use super::dial::{self, Stream};
use crate::node::Node;

/// Messages that wait to be sent; the oldest goes for the next.
const QUEUE: usize = 1_024;
/// Pause after the first failure to connect; doubled by each further one.
const RETRY_MIN: Duration = Duration::from_millis(50);
/// Longest pause.
const RETRY_MAX: Duration = Duration::from_millis(500);
/// Above streams of records.
const PRIORITY: i32 = 10;

/// The way to one member.
#[derive(Default)]
pub struct QuorumLink {
    queue: RefCell<VecDeque<Bytes>>,
    wake: WaitList,
    connected: Cell<bool>,
    ended: Cell<bool>,
    restarts: Cell<u64>,
}

impl QuorumLink {
    /// Sends a message, or drops it.
    pub fn send(&self, message: Bytes) {
        let mut queue = self.queue.borrow_mut();
        // Nobody is there: what is said now will not interest whoever comes back.
        let room = if self.connected.get() { QUEUE } else { 8 };
        while queue.len() >= room {
            queue.pop_front();
        }
        queue.push_back(message);
        drop(queue);
        self.wake.wake_all();
    }

    /// The other's process seems to have died: what is connected to it is given up, and connected anew.
    pub fn restart(&self) {
        self.restarts.set(self.restarts.get() + 1);
        self.wake.wake_all();
    }

    /// The member is gone for good.
    pub fn end(&self) {
        self.ended.set(true);
        self.wake.wake_all();
    }

    fn has_work(&self) -> bool {
        self.ended.get() || !self.queue.borrow().is_empty()
    }

    /// Keeps the link up as long as the node runs and the other is a member.
    pub async fn run(&self, node: &Rc<Node>, to: i32) {
        let mut pause = RETRY_MIN;
        let mut told = String::new();
        loop {
            // Nothing to say, nothing to connect for.
            self.wake.wait(|| self.has_work().then_some(())).await;
            if node.is_stopping() || self.ended.get() {
                return;
            }
            let error = match dial::open(node, to, 0, StreamKind::Quorum).await {
                Ok(stream) => {
                    tracing::info!(peer = to, "connected to a member of the metadata quorum");
                    pause = RETRY_MIN;
                    told.clear();
                    self.connected.set(true);
                    let ended = self.carry(stream).await;
                    self.connected.set(false);
                    ended
                }
                Err(error) => error,
            };
            node.coordinator().controller.quorum.unreachable(to);
            let error = error.to_string();
            // Once for each reason.
            if told != error && !node.is_stopping() {
                tracing::warn!(peer = to, error, "a member of the metadata quorum cannot be reached");
                told = error;
            }
            node.host.sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    async fn carry(&self, stream: Stream) -> LinkError {
        let Stream {
            connection,
            mut tx,
            mut rx,
            ..
        } = stream;
        tx.set_priority(PRIORITY);
        let restarts = self.restarts.get();
        let sending = async {
            loop {
                let restarted = || self.restarts.get() != restarts;
                self.wake.wait(|| (self.has_work() || restarted()).then_some(())).await;
                if self.ended.get() {
                    return LinkError::Lost("it is no member any more".into());
                }
                if restarted() {
                    return LinkError::Lost("its process has died".into());
                }
                let messages: Vec<Vec<Bytes>> = self.queue.borrow_mut().drain(..).map(|m| vec![m]).collect();
                if let Err(error) = tx.send(messages).await {
                    return error;
                }
            }
        };
        // Nothing comes back but the end.
        let ended = async {
            match rx.next().await {
                Ok(None) => LinkError::Lost("the peer has closed it".into()),
                Ok(Some(_)) => LinkError::Garbage("a frame where none was due".into()),
                Err(error) => error,
            }
        };
        let error = futures_lite::future::or(sending, ended).await;
        connection.close("the link has ended");
        error
    }
}
