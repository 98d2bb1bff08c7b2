//! Messages between shards: a closure to be run there, and its answer back.
//!
//! Each shard has one bounded mailbox. A caller puts a slot into a sharded slab and sends its key along; the answer is
//! put into the slot and the caller woken. Nothing is shared beyond that.

use std::{
    any::Any,
    future::{Future, poll_fn},
    pin::Pin,
    rc::Rc,
    sync::{Arc, OnceLock},
    task::Poll,
};

use atomic_waker::AtomicWaker;
use sharded_slab::Slab;
use thiserror::Error;

use crate::node::Node;

/// Jobs waiting at one shard; further senders wait, which stops them reading their sockets.
const MAILBOX: usize = 4096;

type Local = Pin<Box<dyn Future<Output = ()>>>;
/// Work for another shard.
pub type Job = Box<dyn FnOnce(Rc<Node>) -> Local + Send>;

/// The shard asked is gone: the broker is stopping.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
#[error("the broker is stopping")]
pub struct Stopping;

struct Slot {
    answer: OnceLock<Box<dyn Any + Send + Sync>>,
    waker: AtomicWaker,
}

/// Sends to every shard.
#[derive(Clone)]
pub struct Router {
    mailboxes: Arc<[flume::Sender<Job>]>,
    slots: Arc<Slab<Slot>>,
}

/// Frees a slot when its caller has its answer or gives up.
struct Claim<'a> {
    slots: &'a Slab<Slot>,
    key: usize,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.slots.remove(self.key);
    }
}

/// An answer on its way between threads: handed over once, so it need not be `Sync` itself.
struct Parcel<T>(std::sync::Mutex<Option<T>>);

impl Router {
    /// Mailboxes for `shards` shards, and their receiving ends.
    #[must_use]
    pub fn new(shards: usize) -> (Self, Vec<flume::Receiver<Job>>) {
        let (senders, receivers): (Vec<_>, Vec<_>) = (0..shards).map(|_| flume::bounded(MAILBOX)).unzip();
        let router = Self {
            mailboxes: senders.into(),
            slots: Arc::new(Slab::new()),
        };
        (router, receivers)
    }

    /// Number of shards.
    #[must_use]
    pub fn shards(&self) -> usize {
        self.mailboxes.len()
    }

    /// Runs `work` on `shard` and waits for its answer. On the caller's own shard it runs at once.
    ///
    /// # Errors
    /// [`Stopping`].
    pub async fn call<T, F, W>(&self, from: &Rc<Node>, shard: usize, work: W) -> Result<T, Stopping>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
        W: FnOnce(Rc<Node>) -> F + Send + 'static,
    {
        if shard == from.shard {
            return Ok(work(Rc::clone(from)).await);
        }
        let key = self
            .slots
            .insert(Slot {
                answer: OnceLock::new(),
                waker: AtomicWaker::new(),
            })
            .ok_or(Stopping)?;
        let claim = Claim {
            slots: &self.slots,
            key,
        };
        let slots = Arc::clone(&self.slots);
        let job: Job = Box::new(move |node| {
            Box::pin(async move {
                let answer = work(node).await;
                // The caller may have given up; then there is no slot any more.
                if let Some(slot) = slots.get(key) {
                    let parcel: Box<dyn Any + Send + Sync> = Box::new(Parcel(std::sync::Mutex::new(Some(answer))));
                    let _ = slot.answer.set(parcel);
                    slot.waker.wake();
                }
            })
        });
        self.mailboxes[shard].send_async(job).await.map_err(|_| Stopping)?;
        let answer = poll_fn(|cx| {
            let Some(slot) = self.slots.get(claim.key) else {
                return Poll::Ready(None);
            };
            slot.waker.register(cx.waker());
            match slot.answer.get() {
                Some(answer) => {
                    let parcel = answer.downcast_ref::<Parcel<T>>();
                    Poll::Ready(parcel.and_then(|p| p.0.lock().ok()?.take()))
                }
                None => Poll::Pending,
            }
        })
        .await;
        answer.ok_or(Stopping)
    }

    /// Wakes what waits for the stop on every shard; callable from any thread.
    pub fn wake_all(&self) {
        for mailbox in self.mailboxes.iter() {
            let job: Job = Box::new(|node| Box::pin(async move { node.stop.wake_all() }));
            // A full mailbox is being worked on; its shard will look at the flag soon.
            let _ = mailbox.send_timeout(job, std::time::Duration::from_secs(1));
        }
    }

    /// Runs `work` on every shard and waits for all.
    ///
    /// # Errors
    /// [`Stopping`].
    pub async fn broadcast<F, W>(&self, from: &Rc<Node>, work: W) -> Result<(), Stopping>
    where
        F: Future<Output = ()> + 'static,
        W: Fn(Rc<Node>) -> F + Clone + Send + 'static,
    {
        for shard in 0..self.shards() {
            self.call(from, shard, work.clone()).await?;
        }
        Ok(())
    }
}

/// Runs `work` once on every shard named, with the items for it, side by side; results come in the order of the items.
///
/// # Errors
/// [`Stopping`] for each item whose shard is gone.
pub async fn scatter<T, R, F, W>(node: &Rc<Node>, items: Vec<(usize, T)>, work: W) -> Vec<Result<R, Stopping>>
where
    T: Send + 'static,
    R: Send + 'static,
    F: Future<Output = Vec<R>> + 'static,
    W: Fn(Rc<Node>, Vec<T>) -> F + Clone + Send + 'static,
{
    let mut by_shard: Vec<(usize, Vec<usize>, Vec<T>)> = Vec::new();
    let count = items.len();
    for (index, (shard, item)) in items.into_iter().enumerate() {
        match by_shard.iter_mut().find(|(s, _, _)| *s == shard) {
            Some((_, indexes, list)) => {
                indexes.push(index);
                list.push(item);
            }
            None => by_shard.push((shard, vec![index], vec![item])),
        }
    }
    let mut results: Vec<Result<R, Stopping>> = (0..count).map(|_| Err(Stopping)).collect();
    let mut running: Vec<_> = by_shard
        .into_iter()
        .map(|(shard, indexes, list)| {
            let work = work.clone();
            let call = node.router.call(node, shard, move |n| work(n, list));
            (indexes, Box::pin(call))
        })
        .collect();
    poll_fn(|cx| {
        running.retain_mut(|(indexes, call)| match call.as_mut().poll(cx) {
            Poll::Pending => true,
            Poll::Ready(Ok(answers)) => {
                for (index, answer) in indexes.iter().zip(answers) {
                    results[*index] = Ok(answer);
                }
                false
            }
            Poll::Ready(Err(Stopping)) => false,
        });
        if running.is_empty() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
    results
}
