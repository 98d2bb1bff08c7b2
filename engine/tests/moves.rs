//! Partitions move between shards while they are written to; a power cut at every operation that changes the disk leaves all that
//! was acknowledged, and nothing else.
//!
//! Replay one case with `MILLRACE_SEED=n cargo test -p millrace-engine --test moves`.

mod common;

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use common::{
    LOG, append, config,
    history::{Model, payload, verify_after_cut},
    key, open_shards, seeds,
};
use millrace_engine::{
    AppendError, StorageError,
    disk::sim::{Fault, SimHost, SimRng},
    host::Host,
    log::LogState,
    recovery,
    shard::Shard,
};

const SHARDS: u32 = 3;
const PARTITIONS: u32 = 4;

async fn open(host: &SimHost, shards: u32) -> Option<Vec<Shard<SimHost>>> {
    let recovered = recovery::recover(host, &config(0, 0), shards).await.ok()?;
    open_shards(host, recovered.incarnation, shards).await.ok()
}

async fn go(from: &Shard<SimHost>, to: &Shard<SimHost>, p: u32) -> Result<(), StorageError> {
    let partition = from.partition(&key(p)).expect("it is there");
    from.hold(&partition)?;
    let state = match from.settle(&partition).await {
        Ok(state) => state,
        Err(error) => {
            from.resume(&partition);
            return Err(error);
        }
    };
    if let Err(error) = to.adopt(state, partition.config()).await {
        from.fail_move(&partition, &error.to_string());
        return Err(error);
    }
    let gone = from.let_go(&key(p)).await;
    let arrived = to.partition(&key(p)).expect("adopted");
    let status = arrived.status();
    assert_eq!(status.durable_end, status.log_end, "all that was taken in is durable");
    match gone {
        Ok(()) => to.resume(&arrived),
        Err(error) => to.fail_move(&arrived, &error.to_string()),
    }
    Ok(())
}

/// Appends, moves, flushes and deletions; appends to a partition on its way are refused and not repeated.
async fn workload(host: SimHost, model: Rc<RefCell<Model>>, seed: u64, operations: u64, moved: Rc<Cell<u64>>) {
    let mut rng = SimRng::new(seed);
    let Some(shards) = open(&host, SHARDS).await else {
        return;
    };
    let shards = Rc::new(shards);
    let homes: Rc<RefCell<Vec<usize>>> = Rc::new(RefCell::new((0..PARTITIONS as usize).map(|p| p % 3).collect()));
    for p in 0..PARTITIONS {
        shards[p as usize % 3].add_partition(LogState::new(key(p)), LOG);
    }
    for tag in 0..operations {
        let p = rng.below(u64::from(PARTITIONS)) as u32;
        let home = homes.borrow()[p as usize];
        let Some(partition) = shards[home].partition(&key(p)) else {
            continue;
        };
        match rng.below(24) {
            0 => {
                let _ = shards[home].flush_all().await;
            }
            1 => {
                let status = partition.status();
                let to = status.log_start + (status.high_watermark - status.log_start) / 2;
                if let Ok(start) = shards[home].delete_records(&partition, to).await {
                    model.borrow_mut().log_start.insert(p, start);
                }
            }
            2..4 => {
                let target = (home + 1 + rng.below(2) as usize) % 3;
                let (shards, homes, moved) = (Rc::clone(&shards), Rc::clone(&homes), Rc::clone(&moved));
                let work = async move {
                    if go(&shards[home], &shards[target], p).await.is_ok() {
                        homes.borrow_mut()[p as usize] = target;
                        moved.set(moved.get() + 1);
                    }
                };
                if rng.below(2) == 0 {
                    work.await;
                } else {
                    host.spawn(work);
                }
            }
            _ => {
                let bytes = payload(&mut rng, tag);
                match Model::append(&model, &shards[home], p, bytes).await {
                    Ok(ack) if rng.below(3) == 0 => ack.await,
                    Ok(ack) => host.spawn(ack),
                    // On its way, or, after the cut, offline.
                    Err(AppendError::Storage(_) | AppendError::UnknownPartition(_)) => {}
                    Err(error) => panic!("{error}"),
                }
                for _ in 0..rng.below(4) {
                    futures_lite::future::yield_now().await;
                }
            }
        }
    }
    for shard in shards.iter() {
        let _ = shard.flush_all().await;
    }
}

#[test]
fn a_cut_at_every_operation_of_moves_leaves_all_that_was_acknowledged() {
    for seed in seeds(4) {
        let (host, moved) = (SimHost::new(), Rc::new(Cell::new(0)));
        host.run(workload(host.clone(), Rc::default(), seed, 150, Rc::clone(&moved)))
            .expect("an uncut run ends");
        let total = host.operations();
        println!("seed {seed}: {total} operations to cut at, {} moves", moved.get());
        assert!(moved.get() >= 5, "the workload moves partitions");
        for cut in 0..=total {
            let host = SimHost::new();
            let model = Rc::new(RefCell::new(Model::default()));
            host.inject(Fault::CutAfter(cut));
            host.run(workload(host.clone(), Rc::clone(&model), seed, 150, Rc::default()));
            verify_after_cut(&host, &model.borrow(), seed, cut);
        }
    }
}

#[test]
fn a_move_keeps_what_is_read_and_goes_on_where_the_log_ended() {
    let host = SimHost::new();
    host.run(async {
        let shards = open(&host, 2).await.expect("opens");
        shards[0].add_partition(LogState::new(key(0)), LOG);
        for n in 0..30_i64 {
            let from = &shards[(n % 2) as usize];
            assert_eq!(append(from, 0, &n.to_le_bytes()).await, Ok(n));
            let to = &shards[(n % 2) as usize ^ 1];
            go(from, to, 0).await.expect("a sound disk");
            assert!(from.partition(&key(0)).is_none(), "one shard has it");
            let records = to.read(key(0), 0, 1 << 20, true).await.expect("readable");
            assert_eq!(records.next_offset, n + 1);
        }
    })
    .expect("ends");
}

#[test]
fn what_is_held_changes_no_more_and_a_move_given_up_leaves_it_where_it_was() {
    let host = SimHost::new();
    host.run(async {
        let shards = open(&host, 2).await.expect("opens");
        shards[0].add_partition(LogState::new(key(0)), LOG);
        append(&shards[0], 0, b"before").await.expect("healthy");
        let partition = shards[0].partition(&key(0)).expect("there");
        shards[0].hold(&partition).expect("free");
        assert!(matches!(shards[0].hold(&partition), Err(StorageError::Moving)));
        let refused = append(&shards[0], 0, b"meanwhile").await.expect_err("held");
        assert!(refused.contains("moved to another core"), "{refused}");
        assert!(matches!(
            shards[0].delete_records(&partition, 1).await,
            Err(StorageError::Moving)
        ));
        shards[0].resume(&partition);
        assert_eq!(append(&shards[0], 0, b"after").await, Ok(1));
    })
    .expect("ends");
}

#[test]
fn a_checkpoint_that_fails_half_way_takes_the_partition_offline_and_nothing_is_lost() {
    // Each write of the move fails in turn, until one comes behind them all.
    for nth in 0.. {
        let host = SimHost::new();
        let whole = host
            .run(async {
                let shards = open(&host, 2).await.expect("opens");
                shards[0].add_partition(LogState::new(key(0)), LOG);
                shards[1].add_partition(LogState::new(key(1)), LOG);
                for n in 0..5_i64 {
                    append(&shards[0], 0, &n.to_le_bytes()).await.expect("healthy");
                }
                host.sleep(std::time::Duration::from_millis(50)).await;
                host.inject(Fault::WriteError(nth));
                let moved = go(&shards[0], &shards[1], 0).await;
                let here = shards[0].partition(&key(0)).or(shards[1].partition(&key(0)));
                let healthy = here.expect("one has it").check_writable();
                if moved.is_ok() && healthy.is_ok() {
                    return true;
                }
                // What other partitions do goes on, and stores checkpoints.
                if append(&shards[1], 1, b"other").await.is_ok() {
                    shards[1].flush_all().await.expect("healthy");
                }
                if shards[0].poisoned().is_none() {
                    let _ = shards[0].flush_all().await;
                }
                false
            })
            .expect("ends");
        if whole {
            assert!(nth >= 3, "only {nth} writes");
            return;
        }
        let disk = host.after_kill();
        let recovered = disk
            .run(recovery::recover(&disk, &config(0, 0), 2))
            .expect("ends")
            .expect("sound");
        let log = recovered.partitions.iter().find(|s| s.key == key(0)).expect("there");
        assert_eq!(log.log_end(), 5, "write {nth} failed");
    }
}
