//! Waiting among the tasks of one thread. No locks, no atomics: nothing here leaves its shard.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::{Future, poll_fn},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

/// Tasks that wait for a condition someone else will make true. To register and to leave costs the same however many wait.
#[derive(Default)]
pub struct WaitList {
    waiting: RefCell<Waiting>,
}

#[derive(Default)]
struct Waiting {
    wakers: Vec<Option<Waker>>,
    /// Indexes that were left.
    free: Vec<usize>,
    /// How often all were woken: an index from before means nothing.
    round: u64,
}

/// A place in a [`WaitList`], given up on drop, so that waits that time out leave nothing behind.
pub struct Place<'a> {
    list: &'a WaitList,
    /// Round and index, once registered.
    at: Cell<Option<(u64, usize)>>,
}

impl Place<'_> {
    /// Asks to be woken at the next [`WaitList::wake_all`].
    pub fn register(&self, cx: &Context<'_>) {
        let mut waiting = self.list.waiting.borrow_mut();
        let waiting = &mut *waiting;
        if let Some((round, index)) = self.at.get()
            && round == waiting.round
        {
            match &mut waiting.wakers[index] {
                Some(waker) => waker.clone_from(cx.waker()),
                left => *left = Some(cx.waker().clone()),
            }
            return;
        }
        let waker = Some(cx.waker().clone());
        let index = match waiting.free.pop() {
            Some(index) => {
                waiting.wakers[index] = waker;
                index
            }
            None => {
                waiting.wakers.push(waker);
                waiting.wakers.len() - 1
            }
        };
        self.at.set(Some((waiting.round, index)));
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut waiting = self.list.waiting.borrow_mut();
        if let Some((round, index)) = self.at.get()
            && round == waiting.round
        {
            waiting.wakers[index] = None;
            waiting.free.push(index);
        }
    }
}

impl WaitList {
    /// Wakes everyone; each looks at its own condition again.
    pub fn wake_all(&self) {
        // Taken first: a waker may run code that waits again.
        let mut woken = {
            let mut waiting = self.waiting.borrow_mut();
            if waiting.wakers.is_empty() {
                return;
            }
            waiting.round += 1;
            waiting.free.clear();
            std::mem::take(&mut waiting.wakers)
        };
        woken.drain(..).flatten().for_each(Waker::wake);
        let mut waiting = self.waiting.borrow_mut();
        if waiting.wakers.is_empty() {
            waiting.wakers = woken;
        }
    }

    /// A place to wait at, for futures that wait on several lists at once.
    #[must_use]
    pub fn place(&self) -> Place<'_> {
        Place {
            list: self,
            at: Cell::new(None),
        }
    }

    /// Waits until `ready` returns something. It is asked at once and after every [`wake_all`](Self::wake_all).
    pub async fn wait<T>(&self, mut ready: impl FnMut() -> Option<T>) -> T {
        if let Some(value) = ready() {
            return value;
        }
        let place = self.place();
        poll_fn(|cx| match ready() {
            Some(value) => Poll::Ready(value),
            None => {
                place.register(cx);
                Poll::Pending
            }
        })
        .await
    }
}

/// A bounded budget of bytes, handed out first come, first served, so that a large request is not starved and
/// the order of arrival is the order of admission.
pub struct Budget {
    /// Below zero where permits have grown over what there was.
    free: Cell<i64>,
    capacity: u64,
    queue: RefCell<VecDeque<(u64, Option<Waker>)>>,
    next_ticket: Cell<u64>,
}

/// Bytes taken from a [`Budget`]; given back on drop.
pub struct Permit {
    budget: Rc<Budget>,
    bytes: u64,
}

impl Permit {
    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Makes it as large as what it stands for has become, whether there is as much or not: who comes next waits for longer then.
    pub fn resize(&mut self, bytes: u64) {
        let budget = &self.budget;
        budget.free.set(budget.free.get() + signed(self.bytes) - signed(bytes));
        self.bytes = bytes;
        budget.wake_first();
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.resize(0);
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

struct Turn<'a> {
    budget: &'a Budget,
    ticket: u64,
    served: bool,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if !self.served {
            self.budget.queue.borrow_mut().retain(|(t, _)| *t != self.ticket);
            self.budget.wake_first();
        }
    }
}

impl Budget {
    /// A budget of `capacity` bytes.
    #[must_use]
    pub fn new(capacity: u64) -> Rc<Self> {
        Rc::new(Self {
            free: Cell::new(signed(capacity)),
            capacity,
            queue: RefCell::default(),
            next_ticket: Cell::new(0),
        })
    }

    /// Bytes handed out.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.capacity.saturating_add_signed(-self.free.get())
    }

    /// Bytes that are there.
    #[must_use]
    pub fn free(&self) -> u64 {
        u64::try_from(self.free.get()).unwrap_or(0)
    }

    /// Whether somebody waits for some of it.
    #[must_use]
    pub fn is_waited_for(&self) -> bool {
        !self.queue.borrow().is_empty()
    }

    /// A permit for nothing, without waiting, to be [resized](Permit::resize).
    #[must_use]
    pub fn nothing(self: &Rc<Self>) -> Permit {
        Permit {
            budget: Rc::clone(self),
            bytes: 0,
        }
    }

    fn wake_first(&self) {
        if let Some((_, waker)) = self.queue.borrow_mut().front_mut()
            && let Some(waker) = waker.take()
        {
            waker.wake();
        }
    }

    /// Waits for its turn and for `bytes`; a request larger than the whole budget gets all of it.
    pub async fn acquire(self: &Rc<Self>, bytes: u64) -> Permit {
        let bytes = bytes.min(self.capacity);
        if !(self.queue.borrow().is_empty() && self.free.get() >= signed(bytes)) {
            let ticket = self.next_ticket.get();
            self.next_ticket.set(ticket + 1);
            self.queue.borrow_mut().push_back((ticket, None));
            let mut turn = Turn {
                budget: self,
                ticket,
                served: false,
            };
            poll_fn(|cx| {
                let mut queue = self.queue.borrow_mut();
                if queue.front().is_some_and(|(t, _)| *t == ticket) && self.free.get() >= signed(bytes) {
                    queue.pop_front();
                    return Poll::Ready(());
                }
                if let Some(entry) = queue.iter_mut().find(|(t, _)| *t == ticket) {
                    entry.1 = Some(cx.waker().clone());
                }
                Poll::Pending
            })
            .await;
            turn.served = true;
        }
        let mut permit = self.nothing();
        permit.resize(bytes);
        permit
    }
}

/// Runs futures side by side, at most `limit` at a time; results come in the order of the futures.
pub async fn concurrently<T, F: Future<Output = T>>(limit: usize, futures: impl IntoIterator<Item = F>) -> Vec<T> {
    let mut waiting = futures.into_iter().enumerate();
    let mut running: Vec<(usize, Pin<Box<F>>)> = Vec::new();
    let mut done: Vec<Option<T>> = Vec::new();
    poll_fn(|cx| {
        loop {
            while running.len() < limit.max(1)
                && let Some((index, future)) = waiting.next()
            {
                done.push(None);
                running.push((index, Box::pin(future)));
            }
            let before = running.len();
            running.retain_mut(|(index, future)| match future.as_mut().poll(cx) {
                Poll::Ready(value) => {
                    done[*index] = Some(value);
                    false
                }
                Poll::Pending => true,
            });
            if running.is_empty() && before == 0 {
                return Poll::Ready(());
            }
            // Places that became free are filled, and what fills them is polled, before waiting.
            if running.len() == before {
                return Poll::Pending;
            }
        }
    })
    .await;
    done.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        task::Wake,
    };

    use super::*;

    struct Counter(AtomicUsize);
    impl Wake for Counter {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn those_that_wait_are_woken_once_and_places_that_are_left_are_used_again() {
        let list = WaitList::default();
        let counters: Vec<Arc<Counter>> = (0..4).map(|_| Arc::new(Counter(AtomicUsize::new(0)))).collect();
        let wakers: Vec<Waker> = counters.iter().map(|c| Waker::from(Arc::clone(c))).collect();
        let woken = || counters.iter().map(|c| c.0.load(Ordering::Relaxed)).collect::<Vec<_>>();
        let register = |place: &Place<'_>, n: usize| place.register(&Context::from_waker(&wakers[n]));
        let (first, second, third) = (list.place(), list.place(), list.place());
        register(&first, 0);
        register(&second, 1);
        drop(second);
        register(&third, 2);
        // Again, with another waker: the first one's place is still its own.
        register(&first, 3);
        assert_eq!(list.waiting.borrow().wakers.len(), 2);
        list.wake_all();
        assert_eq!(woken(), [0, 0, 1, 1]);
        list.wake_all();
        assert_eq!(woken(), [0, 0, 1, 1], "nobody waits");
        // A place from before the last round takes nothing from those that came after.
        let fourth = list.place();
        register(&fourth, 1);
        drop((first, third));
        list.wake_all();
        assert_eq!(woken(), [0, 1, 1, 1]);
    }
}
