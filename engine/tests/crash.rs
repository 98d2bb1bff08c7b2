//! Crash tests: a workload is cut at every operation that changes the disk, the disk is left as a power
//! cut would leave it, and recovery must yield exactly a prefix that holds everything acknowledged.
//!
//! Replay one case with `MILLRACE_SEED=n cargo test -p millrace-engine --test crash`.

mod common;

use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

use bytes::Bytes;
use common::{LOG, append, config, key};
use millrace_engine::{
    StorageError,
    disk::sim::{Fault, SimHost, SimRng},
    host::Host,
    kafka_batch::{self, NewRecord},
    log::LogState,
    recovery::{self, Recovered},
    shard::{Shard, ShardConfig},
};

/// What a client knows: each partition's batches in order of offset, and how far they were acknowledged.
#[derive(Default)]
struct Model {
    sent: BTreeMap<u32, Vec<(i64, Bytes)>>,
    acked_end: BTreeMap<u32, i64>,
    log_start: BTreeMap<u32, i64>,
}

fn payload(rng: &mut SimRng, tag: u64) -> Bytes {
    let len = match rng.below(10) {
        0..6 => rng.below(300),
        6..9 => 1_000 + rng.below(3_000),
        _ => 6_000 + rng.below(20_000),
    } as usize;
    let mut value = tag.to_le_bytes().to_vec();
    value.resize(8 + len, tag as u8);
    let records = (0..1 + rng.below(3))
        .map(|_| NewRecord {
            key: None,
            value: Some(value.clone().into()),
            timestamp: tag as i64,
        })
        .collect::<Vec<_>>();
    kafka_batch::build(&records, (-1, -1, -1))
}

async fn workload(host: SimHost, model: Rc<RefCell<Model>>, seed: u64, operations: u64, partitions: u32) {
    let mut rng = SimRng::new(seed);
    // Errors here are the cut's: operations that do not wait report it as EIO.
    let Ok(recovered) = recovery::recover(&host, &config(0, 0), 1).await else {
        return;
    };
    // Half of the runs make several partitions durable at once.
    let config = ShardConfig {
        sync_all_min: if seed.is_multiple_of(2) { 2 } else { usize::MAX },
        ..config(0, recovered.incarnation)
    };
    let Ok(shard) = Shard::open(host.clone(), config).await else {
        return;
    };
    let s = shard.clone();
    host.spawn(async move { s.run_commits().await });
    for p in 0..partitions {
        shard.add_partition(LogState::new(key(p)), LOG);
    }
    for tag in 0..operations {
        let p = rng.below(u64::from(partitions)) as u32;
        let partition = shard.partition(&key(p)).expect("added above");
        match rng.below(40) {
            0 => {
                let _ = shard.flush_all().await;
            }
            1 => {
                let status = partition.status();
                let to = status.log_start + (status.high_watermark - status.log_start) / 2;
                if let Ok(start) = shard.delete_records(&partition, to).await {
                    model.borrow_mut().log_start.insert(p, start);
                }
            }
            _ => {
                let bytes = payload(&mut rng, tag);
                let permit = shard.admit(bytes.len()).await;
                let batches = kafka_batch::split(bytes.clone()).expect("built above");
                let appended = shard.append(key(p), 1, batches, permit).expect("healthy");
                model
                    .borrow_mut()
                    .sent
                    .entry(p)
                    .or_default()
                    .push((appended.base_offset, bytes));
                let ack = {
                    let (model, partition) = (Rc::clone(&model), Rc::clone(&partition));
                    async move {
                        if partition.wait_high_watermark(appended.end_offset).await.is_ok() {
                            let mut model = model.borrow_mut();
                            let end = model.acked_end.entry(p).or_default();
                            *end = (*end).max(appended.end_offset);
                        }
                    }
                };
                if rng.below(3) == 0 {
                    ack.await;
                } else {
                    host.spawn(ack);
                }
                // What comes next finds this one on its way to the disk.
                for _ in 0..rng.below(4) {
                    futures_lite::future::yield_now().await;
                }
            }
        }
    }
    let _ = shard.flush_all().await;
}

/// Opens what recovery gave on `shards` shards and checks it against the model; goes on appending afterwards.
async fn verify(host: SimHost, recovered: Recovered, model: &Model, shards: u32, context: &str) {
    let mut opened = Vec::new();
    for n in 0..shards {
        let shard = Shard::open(host.clone(), config(n, recovered.incarnation))
            .await
            .expect("opens");
        let s = shard.clone();
        host.spawn(async move { s.run_commits().await });
        opened.push(shard);
    }
    let mut found = BTreeMap::new();
    for (i, state) in recovered.partitions.into_iter().enumerate() {
        let shard = &opened[i % opened.len()];
        found.insert(state.key.partition, shard.clone());
        shard.add_partition(state, LOG);
    }
    for (p, acked_end) in &model.acked_end {
        let shard = found
            .get(p)
            .unwrap_or_else(|| panic!("{context}: partition {p} is gone"));
        let status = shard.partition(&key(*p)).expect("added").status();
        assert!(
            status.log_end >= *acked_end,
            "{context}: partition {p} ends at {} although {acked_end} was acknowledged",
            status.log_end
        );
        let acked_start = model.log_start.get(p).copied().unwrap_or(0);
        assert!(
            status.log_start >= acked_start,
            "{context}: partition {p} starts at {} although {acked_start} was acknowledged",
            status.log_start
        );
        let mut expected = Vec::new();
        for (base, bytes) in &model.sent[p] {
            let (info, _) = kafka_batch::parse(bytes).expect("sent");
            let end = base + i64::from(info.record_count);
            if end > status.log_start && end <= status.log_end {
                let at = expected.len();
                expected.extend_from_slice(bytes);
                expected[at..at + 8].copy_from_slice(&base.to_be_bytes());
                expected[at + 12..at + 16].copy_from_slice(&1_i32.to_be_bytes());
            }
        }
        let mut got = Vec::new();
        let mut next = status.log_start;
        while next < status.log_end {
            let records = shard
                .read(key(*p), next, 10_000, true)
                .await
                .unwrap_or_else(|e| panic!("{context}: partition {p} offset {next}: {e}"));
            assert!(records.next_offset > next, "{context}: no progress at {next}");
            got.extend_from_slice(&records.bytes);
            next = records.next_offset;
        }
        assert!(got == expected, "{context}: partition {p} does not hold what was sent");
    }
    // It goes on: an append at the end is acknowledged and read back.
    for (p, shard) in found {
        let bytes = kafka_batch::build(&[NewRecord::default()], (-1, -1, -1));
        let permit = shard.admit(bytes.len()).await;
        let batches = kafka_batch::split(bytes).expect("built");
        let appended = shard.append(key(p), 2, batches, permit).expect("healthy");
        let partition = shard.partition(&key(p)).expect("there");
        partition
            .wait_high_watermark(appended.end_offset)
            .await
            .expect("healthy");
        let records = shard
            .read(key(p), appended.base_offset, 1 << 20, true)
            .await
            .expect("readable");
        assert_eq!(records.next_offset, appended.end_offset, "{context}");
    }
    for shard in opened {
        shard.close().await.expect("closes");
    }
}

fn seeds() -> Vec<u64> {
    match std::env::var("MILLRACE_SEED") {
        Ok(seed) => vec![seed.parse().expect("MILLRACE_SEED is a number")],
        Err(_) => (1..=4).collect(),
    }
}

#[test]
fn a_cut_at_every_operation_leaves_a_prefix_with_all_that_was_acknowledged() {
    for seed in seeds() {
        let total = {
            let host = SimHost::new();
            host.run(workload(host.clone(), Rc::default(), seed, 120, 5))
                .expect("an uncut run ends");
            host.operations()
        };
        println!("seed {seed}: {total} operations to cut at");
        for cut in 0..=total {
            let host = SimHost::new();
            let model = Rc::new(RefCell::new(Model::default()));
            host.inject(Fault::CutAfter(cut));
            host.run(workload(host.clone(), Rc::clone(&model), seed, 120, 5));
            let context = format!("seed {seed} cut {cut}");
            let mut rng = SimRng::new(seed ^ (cut << 20));
            let after = if cut % 5 == 0 {
                host.after_kill()
            } else {
                host.after_power_cut(&mut rng)
            };
            let recovered = after
                .run(recovery::recover(&after, &config(0, 0), 1 + (cut % 3) as u32))
                .unwrap_or_else(|| panic!("{context}: recovery does not end"))
                .unwrap_or_else(|e| panic!("{context}: {e}"));
            let shards = 1 + (cut % 3) as u32;
            after
                .run(verify(after.clone(), recovered, &model.borrow(), shards, &context))
                .unwrap_or_else(|| panic!("{context}: stuck"));
        }
    }
}

#[test]
fn a_crash_during_recovery_loses_nothing() {
    for seed in seeds() {
        for cut in (10..400).step_by(13) {
            let host = SimHost::new();
            let model = Rc::new(RefCell::new(Model::default()));
            host.inject(Fault::CutAfter(cut));
            host.run(workload(host.clone(), Rc::clone(&model), seed, 120, 5));
            let mut disk = host.after_kill();
            let mut rng = SimRng::new(seed);
            for attempt in 0..12 {
                disk.inject(Fault::CutAfter(disk.operations() + attempt * 2));
                if let Some(done) = disk.run(recovery::recover(&disk, &config(0, 0), 2)) {
                    let context = format!("seed {seed} cut {cut} attempt {attempt}");
                    let recovered = done.unwrap_or_else(|e| panic!("{context}: {e}"));
                    disk.inject(Fault::CutAfter(u64::MAX / 2));
                    disk.run(verify(disk.clone(), recovered, &model.borrow(), 2, &context))
                        .unwrap_or_else(|| panic!("{context}: stuck"));
                    break;
                }
                disk = disk.after_power_cut(&mut rng);
            }
        }
    }
}

#[test]
fn recovery_twice_gives_the_same() {
    let host = SimHost::new();
    let model = Rc::new(RefCell::new(Model::default()));
    host.run(workload(host.clone(), Rc::clone(&model), 3, 200, 5))
        .expect("ends");
    let disk = host.after_kill();
    let first = disk
        .run(recovery::recover(&disk, &config(0, 0), 1))
        .expect("ends")
        .expect("sound");
    let second = disk
        .run(recovery::recover(&disk, &config(0, 0), 2))
        .expect("ends")
        .expect("sound");
    assert_eq!(second.incarnation, first.incarnation + 1);
    assert_eq!(second.replayed, 0);
    let ends = |r: &Recovered| {
        r.partitions
            .iter()
            .map(|s| (s.key, s.log_start(), s.log_end()))
            .collect::<Vec<_>>()
    };
    assert_eq!(ends(&first), ends(&second));
    disk.run(verify(disk.clone(), second, &model.borrow(), 3, "second"))
        .expect("ends");
}

async fn append_some(host: &SimHost, count: u64) -> Shard<SimHost> {
    let recovered = recovery::recover(host, &config(0, 0), 1).await.expect("sound");
    let shard = Shard::open(host.clone(), config(0, recovered.incarnation))
        .await
        .expect("opens");
    let s = shard.clone();
    host.spawn(async move { s.run_commits().await });
    shard.add_partition(LogState::new(key(0)), LOG);
    for n in 0..count {
        let _ = append_one(&shard, n).await;
    }
    // The ring's further slots are prewritten meanwhile; faults are meant for what comes after.
    host.sleep(std::time::Duration::from_millis(50)).await;
    shard
}

async fn append_one(shard: &Shard<SimHost>, n: u64) -> Result<i64, String> {
    append(shard, 0, n.to_string().as_bytes()).await
}

#[test]
fn damage_of_flushed_groups_is_reported_and_never_cut() {
    let host = SimHost::new();
    host.run(append_some(&host, 10)).expect("ends");
    let disk = host.after_kill();
    let journal = disk
        .files()
        .into_iter()
        .find(|p| p.to_string_lossy().contains("0000-0000.journal"))
        .expect("the first slot");
    // The third group of ten: seven later ones say that it was flushed.
    disk.flip_bit(&journal, 4096 * 3 + 200);
    match disk.run(recovery::recover(&disk, &config(0, 0), 1)).expect("ends") {
        Err(StorageError::Corrupt { path, position, .. }) => {
            assert_eq!(path, journal);
            assert_eq!(position, 4096 * 3);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn damage_of_the_last_group_is_a_torn_tail() {
    let host = SimHost::new();
    host.run(append_some(&host, 10)).expect("ends");
    let disk = host.after_kill();
    let journal = disk
        .files()
        .into_iter()
        .find(|p| p.to_string_lossy().contains("0000-0000.journal"))
        .expect("the first slot");
    disk.flip_bit(&journal, 4096 * 10 + 200);
    let recovered = disk
        .run(recovery::recover(&disk, &config(0, 0), 1))
        .expect("ends")
        .expect("a torn tail");
    assert_eq!(recovered.partitions[0].log_end(), 9);
    assert_eq!(recovered.torn, [(journal, 4096 * 10)]);
}

#[test]
fn a_failed_journal_flush_poisons_the_shard_and_nothing_more_is_acknowledged() {
    let host = SimHost::new();
    host.run(async {
        let shard = append_some(&host, 3).await;
        host.inject(Fault::FlushError(0));
        append_one(&shard, 3).await.expect_err("its flush failed");
        append_one(&shard, 4).await.expect_err("the shard is poisoned");
        assert!(shard.poisoned().is_some());
        let records = shard.read(key(0), 0, 1 << 20, true).await.expect("reads go on");
        assert_eq!(records.next_offset, 3);
    })
    .expect("ends");
    let disk = host.after_kill();
    let recovered = disk
        .run(recovery::recover(&disk, &config(0, 0), 1))
        .expect("ends")
        .expect("sound");
    assert_eq!(recovered.partitions[0].log_end(), 3);
}

#[test]
fn a_full_disk_refuses_appends_and_goes_on_when_room_returns() {
    let host = SimHost::new();
    host.run(async {
        let shard = append_some(&host, 3).await;
        let s = shard.clone();
        host.spawn(async move { s.run_housekeeping().await });
        host.inject(Fault::Full(0));
        host.sleep(std::time::Duration::from_secs(2)).await;
        let refused = append_one(&shard, 3).await.expect_err("no room");
        assert!(refused.contains("disk is full"), "{refused}");
        let records = shard.read(key(0), 0, 1 << 20, true).await.expect("reads go on");
        assert_eq!(records.next_offset, 3);
        host.inject(Fault::Full(u64::MAX));
        host.sleep(std::time::Duration::from_secs(2)).await;
        assert_eq!(append_one(&shard, 3).await, Ok(3));
    })
    .expect("ends");
}

#[test]
fn a_full_disk_during_write_back_loses_nothing() {
    let host = SimHost::new();
    host.run(async {
        let shard = append_some(&host, 20).await;
        let used = host.used();
        host.inject(Fault::Full(used));
        shard.flush_all().await.expect_err("no room for the segment");
        let records = shard.read(key(0), 0, 1 << 20, true).await.expect("from memory");
        assert_eq!(records.next_offset, 20);
        host.inject(Fault::Full(u64::MAX));
        shard.flush_all().await.expect("room again");
    })
    .expect("ends");
    let disk = host.after_kill();
    let recovered = disk
        .run(recovery::recover(&disk, &config(0, 0), 1))
        .expect("ends")
        .expect("sound");
    assert_eq!((recovered.replayed, recovered.partitions[0].log_end()), (0, 20));
}

#[test]
fn a_segment_that_cannot_be_written_takes_its_partition_offline_and_not_the_ring() {
    let host = SimHost::new();
    host.run(async {
        let shard = append_some(&host, 5).await;
        shard.add_partition(LogState::new(key(1)), LOG);
        // The next write is the segment's of partition 0, its only batch-holder.
        host.inject(Fault::WriteError(0));
        shard.flush_all().await.expect("the pass goes on without it");
        append_one(&shard, 5).await.expect_err("offline");
        let records = shard.read(key(0), 0, 1 << 20, true).await.expect("reads go on");
        assert_eq!(records.next_offset, 5);
        assert!(shard.poisoned().is_none());
    })
    .expect("ends");
    let disk = host.after_kill();
    let recovered = disk
        .run(recovery::recover(&disk, &config(0, 0), 1))
        .expect("ends")
        .expect("sound");
    assert_eq!(
        recovered.partitions[0].log_end(),
        5,
        "what was acknowledged is still in the journal"
    );
}
