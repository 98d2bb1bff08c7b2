//! The log against the simplest thing it could be: a list of batches per partition. Random operations, small sizes so
//! that segments roll, batches leave memory and the ring goes round, and restarts in between, clean or killed.
//!
//! Replay one case with `MILLRACE_SEED=n cargo test -p millrace-engine --test model`.

mod common;

use std::{cell::RefCell, collections::BTreeMap, rc::Rc, time::Duration};

use bytes::Bytes;
use common::{LOG, Plain, config, key};
use millrace_engine::{
    ReadError,
    disk::sim::{SimHost, SimRng},
    host::Host,
    kafka_batch::{self, NewRecord},
    log::{LogConfig, LogState},
    recovery,
    shard::Shard,
};

const PARTITIONS: u64 = 3;
const RUNS: u64 = 12;
const OPERATIONS: u64 = 60;

/// A partition as a list.
#[derive(Default)]
struct Model {
    /// First offset, offset behind the last, bytes as served, highest timestamp of each record's offset.
    batches: Vec<(i64, i64, Bytes)>,
    times: Vec<(i64, i64)>,
    start: i64,
    end: i64,
}

fn seeds() -> Vec<u64> {
    match std::env::var("MILLRACE_SEED") {
        Ok(seed) => vec![seed.parse().expect("MILLRACE_SEED is a number")],
        Err(_) => (100..124).collect(),
    }
}

#[test]
fn the_log_does_what_a_list_does() {
    for seed in seeds() {
        println!("seed {seed}");
        let mut disk = SimHost::new();
        let models: Rc<RefCell<BTreeMap<u32, Model>>> = Rc::default();
        for run in 0..RUNS {
            let (host, m) = (disk.clone(), Rc::clone(&models));
            let clean = disk.run(one_run(host, m, seed * 1_000 + run)).expect("ends");
            disk = if clean {
                disk.after_kill()
            } else {
                disk.after_power_cut(&mut SimRng::new(seed + run))
            };
        }
    }
}

/// Recovers, compares, does something of everything, and stops: whether cleanly is the answer.
async fn one_run(host: SimHost, models: Rc<RefCell<BTreeMap<u32, Model>>>, seed: u64) -> bool {
    let mut rng = SimRng::new(seed);
    let recovered = recovery::recover(&host, &config(0, 0), 1).await.expect("sound");
    let epoch = recovered.incarnation as i32;
    let shard = Shard::open(host.clone(), config(0, recovered.incarnation))
        .await
        .expect("opens");
    let commits = shard.clone();
    host.spawn(async move { commits.run_commits().await });
    let log = LogConfig {
        segment_bytes: 12 << 10,
        ..LOG
    };
    for state in recovered.partitions {
        shard.add_partition(state, log);
    }
    for partition in 0..PARTITIONS as u32 {
        shard.add_partition(LogState::new(key(partition)), log);
        compare(&shard, partition, &models).await;
    }
    for _ in 0..OPERATIONS {
        let partition = rng.below(PARTITIONS) as u32;
        match rng.below(20) {
            0..11 => append(&shard, partition, &mut rng, epoch, &models).await,
            11..15 => read(&shard, partition, &mut rng, &models).await,
            15 => find_time(&shard, partition, &mut rng, &models).await,
            16 => delete(&shard, partition, &mut rng, &models).await,
            17 => shard.flush_all().await.expect("written"),
            18 => host.sleep(Duration::from_millis(rng.below(2_000))).await,
            _ => compare(&shard, partition, &models).await,
        }
    }
    let clean = rng.below(2) == 0;
    if clean {
        shard.close().await.expect("written");
    }
    clean
}

async fn append(
    shard: &Shard<SimHost>,
    partition: u32,
    rng: &mut SimRng,
    epoch: i32,
    models: &RefCell<BTreeMap<u32, Model>>,
) {
    let count = 1 + rng.below(4);
    let len = if rng.below(8) == 0 { 3_000 } else { 200 };
    let records: Vec<NewRecord> = (0..count)
        .map(|_| NewRecord {
            key: None,
            value: Some(vec![rng.next_u64() as u8; rng.below(len) as usize].into()),
            timestamp: rng.below(1_000) as i64,
        })
        .collect();
    let bytes = kafka_batch::build(&records, (-1, -1, -1));
    let permit = shard.admit(bytes.len()).await;
    let batches = kafka_batch::split(bytes.clone()).expect("built");
    let appended = shard.append(key(partition), epoch, batches, permit).expect("taken");
    shard
        .partition(&key(partition))
        .expect("there")
        .wait_high_watermark(appended.end_offset)
        .await
        .expect("durable");
    let mut models = models.borrow_mut();
    let model = models.entry(partition).or_default();
    assert_eq!(
        (appended.base_offset, appended.end_offset),
        (model.end, model.end + count as i64)
    );
    let mut served = bytes.to_vec();
    served[..8].copy_from_slice(&model.end.to_be_bytes());
    served[12..16].copy_from_slice(&epoch.to_be_bytes());
    model.batches.push((model.end, appended.end_offset, served.into()));
    for (n, record) in records.iter().enumerate() {
        model.times.push((model.end + n as i64, record.timestamp));
    }
    model.end = appended.end_offset;
}

async fn read(shard: &Shard<SimHost>, partition: u32, rng: &mut SimRng, models: &RefCell<BTreeMap<u32, Model>>) {
    let (offset, max) = {
        let models = models.borrow();
        let end = models.get(&partition).map_or(0, |m| m.end);
        (rng.below(end as u64 + 3) as i64, rng.below(8_000) as usize)
    };
    let at_least_one = rng.below(2) == 0;
    let got = shard.read(key(partition), offset, max, at_least_one).await;
    let models = models.borrow();
    let empty = Model::default();
    let model = models.get(&partition).unwrap_or(&empty);
    if offset < model.start || offset > model.end {
        assert!(matches!(got, Err(ReadError::OffsetOutOfRange { .. })), "{got:?}");
        return;
    }
    let mut expected = Vec::new();
    for (_, end, bytes) in &model.batches {
        if *end <= offset {
            continue;
        }
        let fits = expected.len() + bytes.len() <= max || (at_least_one && expected.is_empty());
        if !fits || (expected.len() >= max && !expected.is_empty()) {
            break;
        }
        expected.extend_from_slice(bytes);
    }
    let got = got.expect("in range");
    assert!(
        got.bytes == expected,
        "offset {offset}, at most {max}: {} bytes, expected {}",
        got.bytes.len(),
        expected.len()
    );
    assert_eq!((got.log_start, got.high_watermark), (model.start, model.end));
}

async fn find_time(shard: &Shard<SimHost>, partition: u32, rng: &mut SimRng, models: &RefCell<BTreeMap<u32, Model>>) {
    let time = rng.below(1_100) as i64;
    let found = shard.find_time(key(partition), time, &Plain).await.expect("in range");
    let models = models.borrow();
    let expected = models.get(&partition).and_then(|m| {
        m.times
            .iter()
            .find(|(offset, timestamp)| *offset >= m.start && *timestamp >= time)
    });
    assert_eq!(found.map(|f| (f.offset, f.timestamp)), expected.copied(), "time {time}");
}

async fn delete(shard: &Shard<SimHost>, partition: u32, rng: &mut SimRng, models: &RefCell<BTreeMap<u32, Model>>) {
    let before = {
        let models = models.borrow();
        let Some(model) = models.get(&partition) else { return };
        model.start + rng.below((model.end - model.start) as u64 / 2 + 1) as i64
    };
    let log = shard.partition(&key(partition)).expect("there");
    shard.delete_records(&log, before).await.expect("in range");
    if let Some(model) = models.borrow_mut().get_mut(&partition) {
        model.start = before;
    }
}

/// Everything, from the front.
async fn compare(shard: &Shard<SimHost>, partition: u32, models: &RefCell<BTreeMap<u32, Model>>) {
    let (start, end) = models.borrow().get(&partition).map_or((0, 0), |m| (m.start, m.end));
    let mut got = Vec::new();
    let mut next = start;
    while next < end {
        let records = shard.read(key(partition), next, 4 << 10, true).await.expect("in range");
        assert!(records.next_offset > next, "no progress at {next}");
        next = records.next_offset;
        got.extend(records.bytes);
    }
    let models = models.borrow();
    let empty = Model::default();
    let model = models.get(&partition).unwrap_or(&empty);
    let status = shard.partition(&key(partition)).expect("there").status();
    assert_eq!(
        (status.log_start, status.high_watermark, status.log_end),
        (model.start, model.end, model.end)
    );
    let expected: Vec<u8> = model
        .batches
        .iter()
        .filter(|(_, end, _)| *end > model.start)
        .flat_map(|(_, _, bytes)| bytes.iter().copied())
        .collect();
    assert!(got == expected, "{} bytes, expected {}", got.len(), expected.len());
}
