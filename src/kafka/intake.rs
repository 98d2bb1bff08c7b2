//! Memory for requests that are received or worked on: a share of `memory` for each shard. It is taken as their bytes arrive, so that
//! a length that is only stated takes nothing from others, and given back when what it stands for is: a request that waits for its
//! client's sake has been taken apart before. Requests of each size have room of their own, so that none waits behind a larger one. Where
//! it is used up one request of that size goes on beyond it until it is done, so that several that are half there cannot wait for each
//! other; the others wait, and a sender that falls silent meanwhile is closed ([`idle`](super::idle)).

use std::{io, rc::Rc};

use futures_lite::future;
use millrace_engine::sync::{Budget, Permit};

use crate::node::Node;

/// Requests up to so many bytes, and their share of the room in quarters: what producers send by the record, by the batch, and the rest.
const SIZES: [(usize, u64); 3] = [(64 << 10, 1), (2 << 20, 2), (usize::MAX, 1)];

/// What an element of an array takes when it is decoded, and its part of the answer before that is encoded, bytes. Measured: 300 to 600.
pub const ELEMENT_BYTES: usize = 512;
/// Elements that any request may have, however little memory there is.
pub const ELEMENTS_LEAST: usize = 100_000;
/// Elements that the request's own bytes stand for.
const FEW_ELEMENTS: usize = SIZES[0].0 / ELEMENT_BYTES;

/// Room for requests of one size.
struct Lane {
    room: Rc<Budget>,
    /// Held by the request that goes beyond it.
    beyond: Rc<Budget>,
}

impl Lane {
    fn new(bytes: u64) -> Rc<Self> {
        Rc::new(Self {
            room: Budget::new(bytes),
            beyond: Budget::new(1),
        })
    }
}

/// Room for the requests of one shard's connections.
pub struct Intake {
    /// By size, as [`SIZES`].
    lanes: [Rc<Lane>; SIZES.len()],
}

/// What one request has of it; given back on drop.
pub struct Held {
    lane: Rc<Lane>,
    permit: Permit,
    beyond: Option<Permit>,
}

impl Intake {
    /// Room of so many bytes.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        Self {
            lanes: SIZES.map(|(_, quarters)| Lane::new(bytes / 4 * quarters)),
        }
    }

    /// For a request that is said to have so many bytes; takes nothing yet.
    #[must_use]
    pub fn begin(&self, length: usize) -> Held {
        let size = SIZES.iter().take_while(|(longest, _)| *longest < length).count();
        let lane = &self.lanes[size];
        Held {
            permit: lane.room.nothing(),
            lane: Rc::clone(lane),
            beyond: None,
        }
    }

    /// Whether somebody waits for room.
    #[must_use]
    pub fn is_waited_for(&self) -> bool {
        self.lanes.iter().any(|lane| lane.room.is_waited_for())
    }
}

impl Held {
    /// Waits until there is room for so many bytes of the request that are `needed`; where there is plenty, takes as many as are `useful`.
    /// Returns how many it has.
    pub async fn grow(&mut self, needed: usize, useful: usize) -> usize {
        let (room, have) = (&self.lane.room, self.permit.bytes());
        let foreseen = (useful as u64).saturating_sub(have);
        // Half of the room is for what has come.
        if room.free() >= room.used() + 2 * foreseen {
            self.permit.resize(have + foreseen);
            return useful;
        }
        let more = (needed as u64).saturating_sub(have);
        if more > 0 && self.beyond.is_none() {
            let lane = &self.lane;
            let within = async { (Some(lane.room.acquire(more).await), None) };
            let beyond = async { (None, Some(lane.beyond.acquire(1).await)) };
            // What was acquired is given back, and taken again as part of the whole.
            let (_room, beyond) = future::or(within, beyond).await;
            self.beyond = beyond;
        }
        self.permit.resize(have + more);
        needed
    }
}

/// Waits for room for a request of `length` bytes, and for what its elements will be once it is decoded.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] if they are more than the memory allows for one request.
pub async fn for_elements(node: &Node, held: Held, length: usize, elements: usize) -> io::Result<Held> {
    if elements <= FEW_ELEMENTS {
        return Ok(held);
    }
    if elements > node.elements_max {
        let most = node.elements_max;
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a request of {elements} elements, where {most} are the most with this `memory`"),
        ));
    }
    let bytes = length + elements * ELEMENT_BYTES;
    // It may be in the way of larger ones now, and no longer of smaller ones.
    let mut larger = node.requests.begin(bytes);
    larger.grow(bytes, bytes).await;
    Ok(larger)
}

#[cfg(test)]
mod tests {
    use std::{
        pin::{Pin, pin},
        task::{Context, Poll, Waker},
    };

    use super::*;

    fn poll<T>(future: Pin<&mut impl Future<Output = T>>) -> Option<T> {
        match future.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        }
    }

    #[test]
    fn a_stated_length_takes_nothing() {
        let intake = Intake::new(16 << 20);
        let _drips: Vec<_> = (0..1_000).map(|_| intake.begin(100 << 20)).collect();
        let mut whole = intake.begin(3 << 20);
        assert!(poll(pin!(whole.grow(3 << 20, 3 << 20))).is_some());
        assert!(whole.beyond.is_none() && !intake.is_waited_for());
    }

    #[test]
    fn requests_that_are_half_there_do_not_wait_for_each_other_nor_smaller_ones_for_them() {
        let intake = Intake::new(16 << 20);
        let [mut first, mut second, mut third] = [(); 3].map(|()| {
            let mut held = intake.begin(3 << 20);
            assert!(poll(pin!(held.grow(4 << 18, 4 << 18))).is_some());
            held
        });
        assert!(poll(pin!(first.grow(2 << 20, 2 << 20))).is_some());
        // The room is used up. The first that wants more goes beyond it, to its end.
        assert!(poll(pin!(second.grow(5 << 19, 5 << 19))).is_some());
        assert!(poll(pin!(second.grow(3 << 20, 3 << 20))).is_some());
        let mut of_first = pin!(first.grow(3 << 20, 3 << 20));
        let mut of_third = pin!(third.grow(3 << 20, 3 << 20));
        assert!(poll(of_first.as_mut()).is_none() && poll(of_third.as_mut()).is_none());
        assert!(intake.is_waited_for());
        for (longest, _) in &SIZES[..2] {
            let mut smaller = intake.begin(*longest);
            assert!(poll(pin!(smaller.grow(*longest, *longest))).is_some());
        }
        drop(second);
        assert!(poll(of_first).is_some() && poll(of_third).is_some());
        assert!(!intake.is_waited_for());
    }

    #[test]
    fn all_of_them_come_to_their_end() {
        let intake = Intake::new(16 << 20);
        let done = std::cell::Cell::new(0);
        let large = &intake.lanes[2].room;
        future::block_on(async {
            let one = || async {
                let mut held = intake.begin(10 << 20);
                for mib in 1..=10 {
                    held.grow(mib << 20, mib << 20).await;
                    future::yield_now().await;
                    assert!(large.used() <= (4 << 20) + (10 << 20));
                }
                drop(held);
                done.set(done.get() + 1);
            };
            millrace_engine::sync::concurrently(50, (0..50).map(|_| one())).await;
        });
        assert_eq!((done.get(), large.used()), (50, 0));
        assert!(!intake.is_waited_for());
    }
}
