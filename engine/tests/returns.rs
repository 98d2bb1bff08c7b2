//! Copies of partitions leave a node and come back, over many lives: what is found of a partition is all of one of its copies, the
//! last one that had begun or, before that is durable, the one before, and never the one with something of the other.
//!
//! Replay one case with `MILLRACE_SEED=n cargo test -p millrace-engine --test returns`.

mod common;

use std::{cell::RefCell, collections::BTreeMap, rc::Rc, time::Duration};

use bytes::Bytes;
use common::{
    LOG, after_cut, config,
    history::{contents, end_of, payload, served},
    key, open_shards, seeds,
};
use futures_lite::future;
use millrace_engine::{
    disk::sim::{Fault, SimHost, SimRng},
    host::Host,
    kafka_batch,
    log::LogState,
    recovery::{self, Recovered},
    shard::Shard,
};

const PARTITIONS: u32 = 4;
const LIVES: u64 = 6;

/// What a client knows of one copy.
#[derive(Default)]
struct Copy {
    sent: Vec<(i64, Bytes)>,
    acked_end: i64,
    log_start: i64,
    /// Where it was to begin at most.
    asked_start: i64,
}

/// Of a partition the copies that may be found, the last one begun last.
#[derive(Default)]
struct Copies {
    all: Vec<Rc<RefCell<Copy>>>,
    /// Which one was found.
    found: usize,
}

type Model = BTreeMap<u32, Copies>;

fn begins(model: &RefCell<Model>, p: u32) {
    model.borrow_mut().entry(p).or_default().all.push(Rc::default());
}

fn only_the_last(model: &RefCell<Model>, p: u32) -> Rc<RefCell<Copy>> {
    let mut model = model.borrow_mut();
    let copies = &mut model.get_mut(&p).expect("one has begun").all;
    copies.drain(..copies.len() - 1);
    Rc::clone(&copies[0])
}

/// Appends a batch to a partition whose copy may have to wait before it begins.
async fn append(
    shard: &Shard<SimHost>,
    model: &RefCell<Model>,
    p: u32,
    bytes: Bytes,
) -> Option<impl Future<Output = ()> + use<>> {
    shard.wait_cleared(&key(p)).await.ok()?;
    let copy = only_the_last(model, p);
    let permit = shard.admit(bytes.len()).await;
    let batches = kafka_batch::split(bytes.clone()).expect("built above");
    let appended = shard.append(key(p), 1, batches, permit).ok()?;
    copy.borrow_mut().sent.push((appended.base_offset, bytes));
    let partition = shard.partition(&key(p)).expect("just appended to");
    Some(async move {
        if partition.wait_high_watermark(appended.end_offset).await.is_ok() {
            let mut copy = copy.borrow_mut();
            copy.acked_end = copy.acked_end.max(appended.end_offset);
        }
    })
}

/// One life, to its end or to the first error.
async fn live(host: SimHost, model: Rc<RefCell<Model>>, mut rng: SimRng, (life, count): (u64, u32)) -> Option<()> {
    let recovered = recovery::recover(&host, &config(0, 0), count).await.ok()?;
    let mut logs: BTreeMap<u32, LogState> = recovered.partitions.into_iter().map(|s| (s.key.partition, s)).collect();
    // What is here is durable now, and what is not will not come back.
    for p in 0..PARTITIONS {
        let end = logs.get(&p).map_or(0, LogState::log_end);
        if let Some(copies) = model.borrow_mut().get_mut(&p) {
            copies.all = vec![copies.all.swap_remove(copies.found)];
            let mut copy = copies.all[0].borrow_mut();
            copy.acked_end = end;
            copy.sent.retain(|batch| end_of(batch) <= end);
        }
    }
    // Some are on other nodes by now.
    let gone: Vec<u32> = logs.keys().copied().filter(|_| rng.below(6) == 0).collect();
    let stay = logs.values().filter(|l| !gone.contains(&l.key.partition));
    if !gone.is_empty() {
        gone.iter().for_each(|p| begins(&model, *p));
        recovery::store_base(&host, &config(0, 0), recovered.incarnation, count, stay)
            .await
            .ok()?;
        gone.iter().for_each(|p| drop(only_the_last(&model, *p)));
    }
    let shards = open_shards(&host, recovered.incarnation, count).await.ok()?;
    let of = |p: u32| shards[p as usize % shards.len()].clone();
    for p in 0..PARTITIONS {
        if gone.contains(&p) {
            of(p).remove_files(&key(p)).ok()?;
        } else if let Some(state) = logs.remove(&p) {
            of(p).add_partition(state, LOG);
        }
    }
    for tag in 0..rng.below(150) {
        let p = rng.below(u64::from(PARTITIONS)) as u32;
        let shard = of(p);
        let Some(partition) = shard.partition(&key(p)) else {
            begins(&model, p);
            shard.add_partition(LogState::new(key(p)), LOG);
            shard.clear(key(p));
            continue;
        };
        match rng.below(30) {
            0 => {
                let flushing = shard.clone();
                host.spawn(async move { drop(flushing.flush_all().await) });
            }
            1 => {
                let copy = Rc::clone(model.borrow()[&p].all.last().expect("one has begun"));
                host.spawn(async move {
                    let status = partition.status();
                    let to = status.log_start + (status.high_watermark - status.log_start) / 2;
                    copy.borrow_mut().asked_start = to;
                    if let Ok(start) = shard.delete_records(&partition, to).await {
                        copy.borrow_mut().log_start = start;
                    }
                });
            }
            2 => {
                let status = partition.status();
                let at = status.log_start + rng.below((status.high_watermark - status.log_start) as u64 + 1) as i64;
                host.spawn(async move { drop(shard.read(key(p), at, 5_000, true).await) });
            }
            3 | 4 => {
                shard.remove_partition(&key(p), true);
                begins(&model, p);
                // At once, as a copy that has failed and is mended.
                if rng.below(2) == 0 {
                    shard.add_partition(LogState::new(key(p)), LOG);
                }
            }
            _ => match append(&shard, &model, p, payload(&mut rng, tag + 1_000 * life)).await {
                Some(ack) => {
                    if rng.below(4) == 0 {
                        ack.await;
                    } else {
                        host.spawn(ack);
                    }
                }
                None if partition.check_healthy().is_err() && shard.poisoned().is_none() => {
                    shard.remove_partition(&key(p), true);
                    begins(&model, p);
                    shard.add_partition(LogState::new(key(p)), LOG);
                }
                None => return None,
            },
        }
        if rng.below(2) == 0 {
            host.advance(Duration::from_millis(1));
        }
        for _ in 0..rng.below(4) {
            future::yield_now().await;
        }
    }
    if rng.below(3) == 0 {
        for shard in &shards {
            shard.close().await.ok()?;
        }
    }
    Some(())
}

/// Whether all that is found of each partition is one of its copies; the model then knows which. It may still be another one if the
/// next recovery is cut by loss of power: what a killed process had not flushed may go then.
async fn look(host: SimHost, recovered: Recovered, model: &RefCell<Model>, context: &str) {
    let shard = open_shards(&host, recovered.incarnation, 1)
        .await
        .expect("opens")
        .remove(0);
    let there: Vec<u32> = recovered.partitions.iter().map(|s| s.key.partition).collect();
    for state in recovered.partitions {
        shard.add_partition(state, LOG);
    }
    let mut known = model.take();
    for (p, copies) in &mut known {
        if !there.contains(p) {
            shard.add_partition(LogState::new(key(*p)), LOG);
        }
        let status = shard.partition(&key(*p)).expect("added").status();
        let got = contents(&shard, *p)
            .await
            .unwrap_or_else(|e| panic!("{context}: partition {p}: {e}"));
        let is_it = |copy: &RefCell<Copy>| {
            let copy = copy.borrow();
            status.log_end >= copy.acked_end
                && (copy.log_start..=copy.asked_start).contains(&status.log_start)
                && got == served(&copy.sent, status.log_start, status.log_end)
        };
        let knows = |copy: &RefCell<Copy>| format!("[{}, {})", copy.borrow().log_start, copy.borrow().acked_end);
        copies.found = copies.all.iter().rposition(|copy| is_it(copy)).unwrap_or_else(|| {
            let candidates: Vec<String> = copies.all.iter().map(|c| knows(c)).collect();
            panic!(
                "{context}: partition {p} is {status:?}, {} bytes, and none of {candidates:?}",
                got.len()
            )
        });
    }
    model.replace(known);
}

#[test]
fn a_copy_that_comes_back_is_itself_alone() {
    for seed in seeds(150) {
        let (mut rng, mut host) = (SimRng::new(seed), SimHost::new());
        let model = Rc::new(RefCell::new(Model::default()));
        for life in 0..LIVES {
            let fault = match rng.below(8) {
                0 | 1 => None,
                2 => Some(Fault::WriteError(rng.below(200))),
                3 => Some(Fault::FlushError(rng.below(100))),
                _ => Some(Fault::CutAfter(rng.below(400))),
            };
            let context = format!("seed {seed}, life {life}, {fault:?}");
            if let Some(fault) = fault {
                host.inject(fault);
            }
            // Where a copy returns is decided by the broker: on the core that it left. So there is one.
            let life_long = live(host.clone(), Rc::clone(&model), SimRng::new(rng.next_u64()), (life, 1));
            let over = async {
                host.sleep(Duration::from_secs(60)).await;
                None
            };
            let lived = host.run(future::or(life_long, over));
            assert!(
                fault.is_some() || lived == Some(Some(())),
                "{context}: fails without a cause"
            );
            host = after_cut(&host, seed, life).0;
            let copy = host.after_kill();
            let recovered = copy
                .run(recovery::recover(&copy, &config(0, 0), 1))
                .unwrap_or_else(|| panic!("{context}: recovery does not end"))
                .unwrap_or_else(|e| panic!("{context}: {e}"));
            copy.run(look(copy.clone(), recovered, &model, &context))
                .unwrap_or_else(|| panic!("{context}: stuck"));
        }
    }
}
