//! Logs over many lives: each one goes on with what crashes of those before have left, on another number of shards, and may end
//! anywhere, in the middle of its recovery too, or with a disk that fails or is full. All that was acknowledged in any of them is there after each.
//!
//! Replay one case with `MILLRACE_SEED=n cargo test -p millrace-engine --test lives`.

mod common;

use std::{cell::RefCell, collections::BTreeMap, rc::Rc, time::Duration};

use common::{
    LOG, after_cut, config,
    history::{Model, end_of, payload, verify},
    key, seeds,
};
use futures_lite::future;
use millrace_engine::{
    disk::sim::{Fault, SimHost, SimRng},
    host::Host,
    log::{LogConfig, LogState},
    recovery,
    shard::{Shard, ShardConfig},
};

const PARTITIONS: u32 = 4;
const LIVES: u64 = 6;

/// One life, to its end or to the first error.
async fn live(
    host: SimHost,
    model: Rc<RefCell<Model>>,
    mut rng: SimRng,
    (life, count): (u64, u32),
    log: LogConfig,
) -> Option<()> {
    // Several partitions are made durable at once, or each by itself.
    let sync_all_min = if rng.below(2) == 0 { 2 } else { usize::MAX };
    let config = |shard, incarnation| ShardConfig {
        sync_all_min,
        ..config(shard, incarnation)
    };
    let recovered = recovery::recover(&host, &config(0, 0), count).await.ok()?;
    let mut shards = Vec::new();
    for n in 0..count {
        let shard = Shard::open(host.clone(), config(n, recovered.incarnation)).await.ok()?;
        let s = shard.clone();
        host.spawn(async move { s.run_commits().await });
        shards.push(shard);
    }
    let of = |p: u32| shards[p as usize % shards.len()].clone();
    let mut logs: BTreeMap<u32, LogState> = recovered.partitions.into_iter().map(|s| (s.key.partition, s)).collect();
    for p in 0..PARTITIONS {
        let state = logs.remove(&p).unwrap_or_else(|| LogState::new(key(p)));
        // What is here is durable now, and what is not will not come back.
        let (mut model, end) = (model.borrow_mut(), state.log_end());
        if end > 0 {
            model.acked_end.insert(p, end);
        }
        model.sent.entry(p).or_default().retain(|batch| end_of(batch) <= end);
        of(p).add_partition(state, log);
    }
    for tag in 0..rng.below(120) {
        let p = rng.below(u64::from(PARTITIONS)) as u32;
        let (shard, partition) = (of(p), of(p).partition(&key(p)).expect("added above"));
        match rng.below(30) {
            0 => shard.flush_all().await.ok()?,
            1 => {
                let status = partition.status();
                let to = status.log_start + (status.high_watermark - status.log_start) / 2;
                let start = shard.delete_records(&partition, to).await.ok()?;
                model.borrow_mut().log_start.insert(p, start);
            }
            2 => {
                let status = partition.status();
                let at = status.log_start + rng.below((status.high_watermark - status.log_start) as u64 + 1) as i64;
                shard.read(key(p), at, 5_000, true).await.ok()?;
            }
            _ => {
                let bytes = payload(&mut rng, tag + 1_000 * life);
                let ack = Model::append(&model, &shard, p, bytes).await.ok()?;
                if rng.below(3) == 0 {
                    ack.await;
                } else {
                    host.spawn(ack);
                }
                host.advance(Duration::from_millis(1));
                for _ in 0..rng.below(4) {
                    future::yield_now().await;
                }
            }
        }
    }
    if rng.below(3) == 0 {
        for shard in &shards {
            shard.close().await.ok()?;
        }
    }
    Some(())
}

#[test]
fn what_was_acknowledged_in_any_life_is_there_after_each() {
    for seed in seeds(150) {
        let (mut rng, mut host, model) = (
            SimRng::new(seed),
            SimHost::new(),
            Rc::new(RefCell::new(Model::default())),
        );
        // Every fourth is killed only: what is acknowledged before it is flushed survives that.
        let relaxed = seed.is_multiple_of(4);
        let log = LogConfig {
            flush_messages: if relaxed { 5 } else { 1 },
            ..LOG
        };
        for life in 0..LIVES {
            let fault = match rng.below(8) {
                0 => None,
                _ if relaxed => Some(Fault::CutAfter(rng.below(400))),
                1 => Some(Fault::WriteError(rng.below(200))),
                2 => Some(Fault::FlushError(rng.below(100))),
                3 => Some(Fault::Full(host.used() + rng.below(400_000))),
                _ => Some(Fault::CutAfter(rng.below(400))),
            };
            let context = format!("seed {seed}, life {life}, {fault:?}");
            if let Some(fault) = fault {
                host.inject(fault);
            }
            // A failed sync of the whole file system is told to all shards by a real system, but to one of them here.
            let count = match fault {
                Some(Fault::FlushError(_)) => 1,
                _ => 1 + rng.below(3) as u32,
            };
            let life_long = live(
                host.clone(),
                Rc::clone(&model),
                SimRng::new(rng.next_u64()),
                (life, count),
                log,
            );
            // Nobody frees a full disk: what waits for room then waits for ever.
            let over = async {
                host.sleep(Duration::from_secs(60)).await;
                None
            };
            let lived = host.run(future::or(life_long, over));
            assert!(
                fault.is_some() || lived == Some(Some(())),
                "{context}: fails without a cause"
            );
            host = match relaxed {
                true => host.after_kill(),
                false => after_cut(&host, seed, life).0,
            };
            // On a copy: the next life begins with what this one left, not with what looking at it did.
            let copy = host.after_kill();
            let shards = 1 + (life % 3) as u32;
            let recovered = copy
                .run(recovery::recover(&copy, &config(0, 0), shards))
                .unwrap_or_else(|| panic!("{context}: recovery does not end"))
                .unwrap_or_else(|e| panic!("{context}: {e}"));
            let model = model.borrow();
            copy.run(verify(copy.clone(), recovered, &model, shards, &context))
                .unwrap_or_else(|| panic!("{context}: stuck"));
        }
    }
}
