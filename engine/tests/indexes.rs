//! Indexes of segments: how little a start after a crash has to look through, and that they say what stands in the log, whatever was
//! cut and whenever the power failed.
//!
//! Replay one case with `MILLRACE_SEED=n cargo test -p millrace-engine --test indexes`.

mod common;

use std::cell::RefCell;

use common::{LOG, Plain, after_cut, config, key, seeds};
use millrace_engine::{
    StorageError,
    batch::{Batch, BatchHeader},
    disk::sim::{Fault, SimHost, SimRng},
    host::Host,
    kafka_batch::{self, NewRecord},
    log::{LogConfig, LogState},
    recovery,
    shard::{Shard, ShardConfig},
};

/// Segments of many index entries.
const WIDE: LogConfig = LogConfig {
    segment_bytes: 4 << 20,
    ..LOG
};
/// Operations of one life.
const OPERATIONS: usize = 150;

/// A journal for larger batches than others'.
fn wide(incarnation: u64) -> ShardConfig {
    ShardConfig {
        journal_slot_bytes: 512 << 10,
        direct_bytes_min: 100_000,
        room_ahead_min: 256 << 10,
        queue_bytes: 1 << 20,
        tail_bytes: 256 << 10,
        ..config(0, incarnation)
    }
}

async fn open(host: &SimHost, log: LogConfig) -> Result<Shard<SimHost>, StorageError> {
    let recovered = recovery::recover(host, &wide(0), 1).await?;
    let shard = Shard::open(host.clone(), wide(recovered.incarnation)).await?;
    let s = shard.clone();
    host.spawn(async move { s.run_commits().await });
    let state = recovered.partitions.into_iter().next();
    shard.add_partition(state.unwrap_or_else(|| LogState::new(key(0))), log);
    let partition = shard.partition(&key(0)).expect("added");
    shard.set_replicated(&partition, true);
    Ok(shard)
}

#[derive(Default)]
struct Model {
    /// Timestamp, and the byte that the value is made of, of each offset.
    records: Vec<(i64, u8)>,
    /// So many were acknowledged.
    durable: usize,
}

/// Appends a record of its own batch to the log, as a leader sends it, and waits until it is durable.
async fn append(shard: &Shard<SimHost>, model: &RefCell<Model>, epoch: i32, rng: &mut SimRng) -> Result<(), String> {
    let (timestamp, byte) = (rng.below(1 << 20) as i64, rng.below(256) as u8);
    let record = NewRecord {
        key: None,
        value: Some(vec![byte; 1_000 + rng.below(60_000) as usize].into()),
        timestamp,
    };
    let payload = kafka_batch::build(&[record], (-1, -1, -1));
    let (info, _) = kafka_batch::parse(&payload).expect("built");
    let mut header = BatchHeader::for_kafka(key(0), &info, &payload);
    let base = model.borrow().records.len() as i64;
    (header.base_offset, header.last_offset, header.leader_epoch) = (base, base, epoch);
    let permit = shard.admit(payload.len()).await;
    let appended = shard.append_replicated(key(0), vec![Batch { header, payload }], permit);
    let end = appended.map_err(|e| e.to_string())?;
    model.borrow_mut().records.push((timestamp, byte));
    let partition = shard.partition(&key(0)).expect("added");
    partition.wait_durable(end).await.map_err(|e| e.to_string())?;
    model.borrow_mut().durable = end as usize;
    Ok(())
}

/// Reads some offsets, one in `every`.
async fn check_offsets(shard: &Shard<SimHost>, model: &RefCell<Model>, rng: &mut SimRng, every: u64, context: &str) {
    let records = model.borrow().records.clone();
    for (offset, (timestamp, byte)) in (0..).zip(records) {
        if rng.below(every) > 0 {
            continue;
        }
        let batches = shard.batches_from(key(0), offset, 1).await;
        let batches = match batches {
            Err(error) if !error.to_string().contains("damaged") && shard.poisoned().is_some() => {
                panic!("{context}: {error}")
            }
            other => other.unwrap_or_else(|e| panic!("{context}: offset {offset}: {e}")),
        };
        let header = &batches[0].header;
        assert_eq!(
            (header.base_offset, header.max_timestamp),
            (offset, timestamp),
            "{context}"
        );
        assert!(batches[0].payload.ends_with(&[byte, 0]), "{context}: offset {offset}");
    }
}

/// Looks up all times.
async fn check_times(shard: &Shard<SimHost>, model: &RefCell<Model>, context: &str) {
    let records = model.borrow().records.clone();
    let partition = shard.partition(&key(0)).expect("added");
    shard.advance_high_watermark(&partition, records.len() as i64);
    for (timestamp, _) in &records {
        let found = (shard.find_time(key(0), *timestamp, &Plain)).await;
        let found = found.unwrap_or_else(|e| panic!("{context}: time {timestamp}: {e}"));
        let first = records.iter().position(|(t, _)| t >= timestamp);
        assert_eq!(found.map(|f| f.offset as usize), first, "{context}: time {timestamp}");
    }
}

/// Appends, cuts, reads and writes back; fails where the power does.
async fn live(
    host: &SimHost,
    model: &RefCell<Model>,
    rng: &mut SimRng,
    life: u64,
    context: &str,
) -> Result<(), String> {
    let shard = open(host, WIDE).await.map_err(|e| e.to_string())?;
    let partition = shard.partition(&key(0)).expect("added");
    let mut epoch = life as i32 * 100;
    for _ in 0..OPERATIONS {
        match rng.below(40) {
            0..4 => shard.flush_all().await.map_err(|e| e.to_string())?,
            4 => {
                let end = model.borrow().records.len();
                let to = end - rng.below(end as u64 / 3 + 1) as usize;
                let to = to.max(partition.status().high_watermark as usize);
                epoch += 1;
                let durable = model.borrow().durable;
                model.borrow_mut().durable = durable.min(to);
                shard.truncate(&partition, to as i64).await.map_err(|e| e.to_string())?;
                model.borrow_mut().records.truncate(to);
            }
            5 => check_offsets(&shard, model, rng, 8, context).await,
            _ => append(&shard, model, epoch, rng).await?,
        }
    }
    if rng.below(2) == 0 {
        shard.close().await.map_err(|e| e.to_string())?;
    }
    Ok(())
}

#[test]
fn they_say_what_stands_in_the_log_after_any_life() {
    for seed in seeds(40) {
        let (mut rng, mut host, model) = (SimRng::new(seed), SimHost::new(), RefCell::new(Model::default()));
        for life in 0..4 {
            let fault = match rng.below(6) {
                0 | 1 => None,
                2 => Some(Fault::WriteError(rng.below(300))),
                3 => Some(Fault::FlushError(rng.below(150))),
                _ => Some(Fault::CutAfter(rng.below(900))),
            };
            let context = format!("seed {seed}, life {life}, {fault:?}");
            if let Some(fault) = fault {
                host.inject(fault);
            }
            let lived = host.run(live(&host, &model, &mut rng, life, &context));
            assert!(
                fault.is_some() || lived == Some(Ok(())),
                "{context}: {lived:?} without a cause"
            );
            host = after_cut(&host, seed, life).0;
            host.run(async {
                let shard = open(&host, WIDE).await.unwrap_or_else(|e| panic!("{context}: {e}"));
                let end = shard.partition(&key(0)).expect("added").status().log_end as usize;
                let Model { records, durable } = &mut *model.borrow_mut();
                assert!(
                    (*durable..=records.len()).contains(&end),
                    "{context}: {durable}..={} and {end}",
                    records.len()
                );
                records.truncate(end);
                *durable = end;
            })
            .expect("ends");
            host = host.after_kill();
            host.run(async {
                let shard = open(&host, WIDE).await.expect("opens again");
                check_offsets(&shard, &model, &mut rng, 3, &context).await;
            })
            .expect("ends");
            host = host.after_kill();
        }
        host.run(async {
            let shard = open(&host, WIDE).await.expect("opens");
            check_times(&shard, &model, &format!("seed {seed}")).await;
        })
        .expect("ends");
    }
}

#[test]
fn a_start_after_a_crash_does_not_look_through_all_of_a_segment() {
    let log = LogConfig {
        segment_bytes: 16 << 20,
        ..LOG
    };
    let (host, model) = (SimHost::new(), RefCell::new(Model::default()));
    host.run(async {
        let shard = open(&host, log).await.expect("opens");
        let mut rng = SimRng::new(1);
        while model.borrow().records.len() < 240 {
            append(&shard, &model, 1, &mut rng).await.expect("appended");
        }
        let (bases, end) =
            (shard.partition(&key(0)).expect("added")).with_state(|s| (s.segments().len(), s.segments()[0].end));
        assert!(
            bases == 1 && end > 6 << 20,
            "{bases} segments, the first of {end} bytes"
        );
    })
    .expect("ends");
    let mut host = host;
    for life in 0..3 {
        host = host.after_kill();
        let read = host
            .run(async {
                let shard = open(&host, log).await.expect("opens");
                // It has an index of its own then, of what comes from now on.
                if life > 0 {
                    append(&shard, &model, 1, &mut SimRng::new(life))
                        .await
                        .expect("appended");
                }
                let before = host.bytes_read();
                let batches = shard.batches_from(key(0), 120, 1).await.expect("read");
                assert_eq!(batches[0].header.base_offset, 120);
                host.bytes_read() - before
            })
            .expect("ends");
        println!("life {life}: {read} bytes");
        assert!(read < 3 << 20, "life {life}: {read} bytes were read for one record");
    }
}
