//! What a leader makes of its followers' answers.

use std::collections::VecDeque;

use millrace_cluster::{
    metadata::PartitionImage,
    replica::{
        Leader, Next,
        message::{Says, Standing},
    },
};
use millrace_engine::log::EpochCache;

const LAG_MS: i64 = 1_000;
/// One way, and back with the write: always more is appended meanwhile.
const LATENCY_MS: i64 = 60;

#[test]
fn a_follower_far_away_stays_in_sync_with_a_leader_that_is_never_idle() {
    let image = PartitionImage::new(vec![0, 1]);
    let epochs = EpochCache::default();
    let mut leader = Leader::new(0, 0, 0, 0, LAG_MS);
    leader.committed(&image, 1, 0);
    let mut on_the_way = VecDeque::new();
    for now in 0..10 * LAG_MS {
        // A record each ms, durable here at once.
        let end = now + 1;
        leader.local(0, end, end);
        while let Some(next) = leader.next(1) {
            let (round, says) = match next {
                Next::Order { round, .. } => {
                    let empty = Standing {
                        log_end: 0,
                        durable_end: 0,
                        last_epoch: -1,
                    };
                    (round, Says::Stands(empty))
                }
                Next::Batches { round, .. } => {
                    leader.sent(1, round, end, 1);
                    (round, Says::Durable(end))
                }
            };
            on_the_way.push_back((now + 2 * LATENCY_MS, round, says));
        }
        while let Some((_, round, says)) = on_the_way.pop_front_if(|(at, _, _)| *at <= now) {
            leader.answered(1, round, says, &epochs, 0, now);
        }
        let wish = leader.isr_wish(now, |_| true);
        assert!(wish.is_none(), "{wish:?} after {now} ms");
    }

    // Once nothing is answered any more it is given up, a lag after what it last held was the end.
    let gone = 10 * LAG_MS;
    let wish = (gone..).find_map(|now| {
        leader.local(0, now + 1, now + 1);
        leader.isr_wish(now, |_| true).map(|wish| (now, wish))
    });
    let (at, wish) = wish.expect("it looks for ever");
    assert_eq!(wish.isr, [0]);
    let lag = at - gone;
    assert!((LAG_MS - 4 * LATENCY_MS..=LAG_MS).contains(&lag), "{lag}");
}
