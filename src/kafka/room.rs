//! Memory for answers to fetches on their way: a share of `memory` for each shard. Whoever reads slowly holds what was read for him, so
//! the answers to all get smaller as the room gets less, and wait for it, but not for long: each has a batch at least.

use std::{rc::Rc, time::Duration};

use futures_lite::future;
use millrace_engine::sync::{Budget, Permit};

/// What an answer waits for where the room is used up.
const LEAST: u64 = 64 << 10;
/// How long it does: a peer that reads at all has taken its own answer by then.
const PATIENCE: Duration = Duration::from_millis(200);

/// Room for an answer that would have `wanted` bytes; `pause` is the executor's.
pub async fn take<F: Future<Output = ()>>(
    room: &Rc<Budget>,
    wanted: usize,
    pause: impl FnOnce(Duration) -> F,
) -> Permit {
    let granted = async { room.acquire(room.free().max(LEAST).min(wanted as u64)).await };
    let late = async {
        pause(PATIENCE).await;
        room.nothing()
    };
    future::or(granted, late).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_get_what_is_there_and_never_wait_for_ever() {
        let room = Budget::new(1_000_000);
        let never = |_| std::future::pending();
        let late = |_| std::future::ready(());
        future::block_on(async {
            let mut first = take(&room, 900_000, never).await;
            assert_eq!(first.bytes(), 900_000);
            let second = take(&room, 900_000, never).await;
            assert_eq!(second.bytes(), 100_000);
            let third = take(&room, 900_000, late).await;
            assert_eq!(third.bytes(), 0);
            // A batch that alone is larger than what was granted.
            first.resize(1_200_000);
            drop(second);
            assert_eq!(take(&room, 900_000, late).await.bytes(), 0);
            first.resize(10_000);
            assert_eq!(take(&room, 2_000_000, never).await.bytes(), 990_000);
            // Who waits is woken.
            first.resize(1_000_000);
            let (fourth, ()) = future::zip(take(&room, 900_000, never), async { drop(first) }).await;
            assert_eq!(fourth.bytes(), LEAST);
        });
    }
}
