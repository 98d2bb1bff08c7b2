//! A follower's log: appends at a leader's offsets, cuts at any batch, power cuts at every operation. After recovery the log is
//! what was acknowledged, with no batch of a history that was cut.
//!
//! Replay one case with `MILLRACE_SEED=n cargo test -p millrace-engine --test cut`.

mod common;

use std::{cell::RefCell, rc::Rc};

use bytes::Bytes;
use common::{LOG, after_cut, config, key, open_shards, seeds};
use millrace_engine::{
    batch::{Batch, BatchHeader},
    disk::sim::{Fault, SimHost, SimRng},
    kafka_batch::{self, NewRecord},
    log::LogState,
    recovery,
    salvage::Salvage,
    shard::Shard,
};

/// A log's batches as first offset, epoch and bytes.
type History = Vec<(i64, i32, Bytes)>;

#[derive(Clone, Default)]
struct Model {
    /// What was appended, and not cut.
    history: History,
    /// Where the log began.
    start: i64,
    /// Everything below is durable.
    durable: i64,
    /// While a cut is on its way: the log as it was before, which a crash may bring back.
    before: Option<(History, i64, i64)>,
}

fn end(history: &History, start: i64) -> i64 {
    history.last().map_or(start, |(base, _, bytes)| {
        base + i64::from(kafka_batch::parse(bytes).expect("built").0.record_count)
    })
}

fn batch(rng: &mut SimRng, base: i64, epoch: i32) -> Batch {
    let len = match rng.below(10) {
        0..8 => rng.below(600),
        // Some go straight to the segment.
        _ => 6_000 + rng.below(9_000),
    } as usize;
    let records: Vec<NewRecord> = (0..1 + rng.below(3))
        .map(|_| NewRecord {
            key: None,
            value: Some(vec![rng.below(256) as u8; len].into()),
            timestamp: rng.below(1 << 20) as i64,
        })
        .collect();
    let payload = kafka_batch::build(&records, (-1, -1, -1));
    let (info, _) = kafka_batch::parse(&payload).expect("built");
    let mut header = BatchHeader::for_kafka(key(0), &info, &payload);
    header.last_offset += base;
    header.base_offset = base;
    header.leader_epoch = epoch;
    Batch { header, payload }
}

async fn open(host: &SimHost) -> Option<Shard<SimHost>> {
    let recovered = recovery::recover(host, &config(0, 0), 1).await.ok()?;
    let shard = (open_shards(host, recovered.incarnation, 1).await.ok()?).remove(0);
    let state = recovered.partitions.into_iter().next();
    shard.add_partition(state.unwrap_or_else(|| LogState::new(key(0))), LOG);
    let partition = shard.partition(&key(0)).expect("added");
    shard.set_replicated(&partition, true);
    Some(shard)
}

async fn workload(host: SimHost, model: Rc<RefCell<Model>>, seed: u64, operations: u64) -> Option<()> {
    let mut rng = SimRng::new(seed);
    let shard = open(&host).await?;
    let partition = shard.partition(&key(0)).expect("added");
    let mut epoch = 0;
    for _ in 0..operations {
        match rng.below(24) {
            0 => shard.flush_all().await.ok()?,
            1..4 => {
                let (history, start) = (model.borrow().history.clone(), model.borrow().start);
                let keep = rng.below(history.len() as u64 + 1) as usize;
                let to = history.get(keep).map_or_else(|| end(&history, start), |b| b.0);
                epoch += 1;
                let durable = model.borrow().durable;
                model.borrow_mut().before = Some((history.clone(), start, durable));
                let restart = rng.below(8) == 0;
                {
                    let mut m = model.borrow_mut();
                    m.history.truncate(if restart { 0 } else { keep });
                    m.start = if restart { end(&history, start) + 7 } else { start };
                    m.durable = if restart { m.start } else { durable.min(to) };
                }
                if restart {
                    let at = model.borrow().start;
                    shard.restart_at(&partition, at).await.ok()?;
                } else {
                    shard.truncate(&partition, to).await.ok()?;
                }
                model.borrow_mut().before = None;
            }
            _ => {
                let base = { end(&model.borrow().history, model.borrow().start) };
                let one = batch(&mut rng, base, epoch);
                let permit = shard.admit(one.payload.len()).await;
                let payload = one.payload.clone();
                let log_end = shard.append_replicated(key(0), vec![one], permit).ok()?;
                model.borrow_mut().history.push((base, epoch, payload));
                if rng.below(3) == 0 {
                    partition.wait_durable(log_end).await.ok()?;
                    let mut m = model.borrow_mut();
                    m.durable = m.durable.max(log_end);
                }
            }
        }
    }
    let log_end = partition.status().log_end;
    partition.wait_durable(log_end).await.ok()?;
    model.borrow_mut().durable = log_end;
    let now = model.borrow().clone();
    check(&shard, &now, "while running").await;
    Some(())
}

async fn check(shard: &Shard<SimHost>, model: &Model, context: &str) {
    let partition = shard.partition(&key(0)).expect("added");
    let (start, log_end) = (partition.status().log_start, partition.status().log_end);
    let mut found: History = Vec::new();
    let mut next = start;
    while next < log_end {
        let batches = shard
            .batches_from(key(0), next, 10_000)
            .await
            .unwrap_or_else(|e| panic!("{context}: offset {next}: {e}"));
        assert!(!batches.is_empty(), "{context}: nothing at {next} of {log_end}");
        for b in batches {
            assert_eq!(b.header.base_offset, next, "{context}");
            next = b.header.last_offset + 1;
            found.push((b.header.base_offset, b.header.leader_epoch, b.payload));
        }
    }
    let matches = |history: &History, from: i64, durable: i64| {
        from == start && log_end >= durable && found.len() <= history.len() && found[..] == history[..found.len()]
    };
    let after = matches(&model.history, model.start, model.durable);
    let before = (model.before.as_ref()).is_some_and(|(h, start, durable)| matches(h, *start, *durable));
    assert!(
        after || before,
        "{context}: the log is [{start}, {log_end}) with {:?}, expected {} batches from {} durable to {}, or {:?}",
        found.iter().map(|b| (b.0, b.1)).collect::<Vec<_>>(),
        model.history.len(),
        model.start,
        model.durable,
        model.before.as_ref().map(|(h, s, d)| (h.len(), s, d)),
    );
}

#[test]
fn a_power_cut_at_every_operation_leaves_a_log_without_what_was_cut() {
    for seed in seeds(6) {
        let total = {
            let host = SimHost::new();
            host.run(workload(host.clone(), Rc::default(), seed, 160))
                .expect("an uncut run ends")
                .expect("without errors");
            host.operations()
        };
        println!("seed {seed}: {total} operations to cut at");
        for cut in (0..=total).step_by(2) {
            let host = SimHost::new();
            let model = Rc::new(RefCell::new(Model::default()));
            host.inject(Fault::CutAfter(cut));
            host.run(workload(host.clone(), Rc::clone(&model), seed, 160));
            let context = format!("seed {seed} cut {cut}");
            let (after, mut rng) = after_cut(&host, seed, cut);
            let model = model.borrow();
            after
                .run(async {
                    let shard = open(&after)
                        .await
                        .unwrap_or_else(|| panic!("{context}: does not recover"));
                    check(&shard, &model, &context).await;
                    // A second recovery, after more of both, gives the same again.
                    let partition = shard.partition(&key(0)).expect("added");
                    let base = partition.status().log_end;
                    let one = batch(&mut rng, base, 1_000);
                    let permit = shard.admit(one.payload.len()).await;
                    let log_end = shard
                        .append_replicated(key(0), vec![one], permit)
                        .unwrap_or_else(|e| panic!("{context}: {e}"));
                    partition.wait_durable(log_end).await.expect("healthy");
                    shard.truncate(&partition, base).await.expect("cut again");
                    check(&shard, &model, &format!("{context}, again")).await;
                })
                .unwrap_or_else(|| panic!("{context}: stuck"));
        }
    }
}

#[test]
fn what_was_cut_is_not_salvaged() {
    let host = SimHost::new();
    let model = Rc::new(RefCell::new(Model::default()));
    host.run(workload(host.clone(), Rc::clone(&model), 11, 400))
        .expect("ends")
        .expect("without errors");
    let disk = host.after_kill();
    let found = disk
        .run(async {
            let salvage = Salvage::open(disk.clone(), std::path::Path::new("/data"))
                .await
                .expect("sound");
            let mut found: History = Vec::new();
            salvage
                .visit(key(0), |b| {
                    found.push((b.header.base_offset, b.header.leader_epoch, b.payload.clone()));
                    Ok::<(), millrace_engine::StorageError>(())
                })
                .await
                .expect("sound");
            found
        })
        .expect("ends");
    assert!(
        found == model.borrow().history,
        "the log and what is saved of it differ"
    );
}

#[test]
fn what_the_replicas_agree_on_is_not_cut() {
    let host = SimHost::new();
    host.run(async {
        let shard = open(&host).await.expect("opens");
        let partition = shard.partition(&key(0)).expect("added");
        let mut rng = SimRng::new(1);
        for base in 0..3 {
            let one = loop {
                let one = batch(&mut rng, base, 0);
                if one.header.record_count == 1 {
                    break one;
                }
            };
            let permit = shard.admit(one.payload.len()).await;
            shard.append_replicated(key(0), vec![one], permit).expect("healthy");
        }
        partition.wait_durable(3).await.expect("healthy");
        assert_eq!(partition.status().high_watermark, 0, "the leader has not said so yet");
        shard.advance_high_watermark(&partition, 2);
        shard.truncate(&partition, 2).await.expect("what is behind it may go");
        assert_eq!(partition.status().log_end, 2);
        shard.truncate(&partition, 1).await.expect_err("acknowledged");
        let one = batch(&mut rng, 5, 0);
        let permit = shard.admit(one.payload.len()).await;
        shard
            .append_replicated(key(0), vec![one], permit)
            .expect_err("a gap, and offline");
    })
    .expect("ends");
}
