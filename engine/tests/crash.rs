//! Crash tests: a workload is cut at every operation that changes the disk, the disk is left as a power
//! cut would leave it, and recovery must yield exactly a prefix that holds everything acknowledged.
//!
//! Replay one case with `MILLRACE_SEED=n cargo test -p millrace-engine --test crash`.

mod common;

use std::{cell::RefCell, path::PathBuf, rc::Rc, time::Duration};

use common::{
    LOG, append, config,
    history::{Model, payload, verify, verify_after_cut},
    key, open_shards, seeds,
};
use millrace_engine::{
    StorageError,
    disk::sim::{Fault, SimHost, SimRng, UNFILLED},
    host::{Host, HostFile, OpenMode},
    log::{LogConfig, LogState},
    recovery::{self, Recovered},
    shard::{Shard, ShardConfig},
};

async fn workload(host: SimHost, model: Rc<RefCell<Model>>, seed: u64, operations: u64, logs: &[LogConfig]) {
    let partitions = logs.len() as u32;
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
    for (p, log) in (0..).zip(logs) {
        shard.add_partition(LogState::new(key(p)), *log);
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
                let ack = Model::append(&model, &shard, p, bytes).await.expect("healthy");
                if rng.below(3) == 0 {
                    ack.await;
                } else {
                    host.spawn(ack);
                }
                host.advance(Duration::from_millis(1));
                // What comes next finds this one on its way to the disk.
                for _ in 0..rng.below(4) {
                    futures_lite::future::yield_now().await;
                }
            }
        }
    }
    let _ = shard.flush_all().await;
}

/// Whatever went to the disk was put there, and is not what a buffer held before.
fn check_all_was_filled(host: &SimHost) {
    for path in host.files() {
        let bytes = host.contents(&path);
        let at = bytes.windows(8).position(|w| w == [UNFILLED; 8]);
        assert_eq!(at, None, "{}: not filled", path.display());
    }
}

/// How many operations a run has that can be cut at.
fn operations(seed: u64, logs: &[LogConfig]) -> u64 {
    let host = SimHost::new();
    host.run(workload(host.clone(), Rc::default(), seed, 120, logs))
        .expect("an uncut run ends");
    check_all_was_filled(&host);
    println!("seed {seed}: {} operations to cut at", host.operations());
    host.operations()
}

/// The same run cut there, and what its client knows.
fn cut_run(seed: u64, cut: u64, logs: &[LogConfig]) -> (SimHost, Rc<RefCell<Model>>) {
    let host = SimHost::new();
    let model = Rc::new(RefCell::new(Model::default()));
    host.inject(Fault::CutAfter(cut));
    host.run(workload(host.clone(), Rc::clone(&model), seed, 120, logs));
    (host, model)
}

#[test]
fn a_cut_at_every_operation_leaves_a_prefix_with_all_that_was_acknowledged() {
    for seed in seeds(4) {
        for cut in 0..=operations(seed, &[LOG; 5]) {
            let (host, model) = cut_run(seed, cut, &[LOG; 5]);
            verify_after_cut(&host, &model.borrow(), seed, cut);
        }
    }
}

/// Logs whose appends are flushed each, after some, after a time, or when others are.
fn relaxed_logs() -> [LogConfig; 5] {
    const NEVER: i64 = i64::MAX;
    [(1, NEVER), (NEVER, 5), (3, NEVER), (NEVER, NEVER), (NEVER, NEVER)].map(|(flush_messages, flush_ms)| LogConfig {
        flush_messages,
        flush_ms,
        ..LOG
    })
}

#[test]
fn what_is_not_flushed_survives_a_kill_and_a_power_cut_leaves_a_prefix_of_it() {
    for seed in seeds(4) {
        for cut in 0..=operations(seed, &relaxed_logs()) {
            let (host, model) = cut_run(seed, cut, &relaxed_logs());
            let mut rng = SimRng::new(seed ^ (cut << 20));
            for killed in [true, false] {
                let after = if killed {
                    host.after_kill()
                } else {
                    // What was acknowledged without a flush may be gone; what was flushed may not.
                    let mut model = model.borrow_mut();
                    for (p, end) in &mut model.acked_end {
                        *end = if *p == 0 { *end } else { 0 };
                    }
                    host.after_power_cut(&mut rng)
                };
                let context = format!("seed {seed} cut {cut} killed {killed}");
                let recovered = after
                    .run(recovery::recover(&after, &config(0, 0), 1))
                    .unwrap_or_else(|| panic!("{context}: recovery does not end"))
                    .unwrap_or_else(|e| panic!("{context}: {e}"));
                // Of a log without a flush nothing need be there at all.
                let there = |p: &u32| recovered.partitions.iter().any(|log| log.key.partition == *p);
                (model.borrow_mut().acked_end).retain(|p, end| *end > 0 || there(p));
                after
                    .run(verify(after.clone(), recovered, &model.borrow(), 1, &context))
                    .unwrap_or_else(|| panic!("{context}: stuck"));
            }
        }
    }
}

#[test]
fn a_crash_during_recovery_loses_nothing() {
    for seed in seeds(4) {
        for cut in (10..400).step_by(13) {
            let (host, model) = cut_run(seed, cut, &[LOG; 5]);
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
    host.run(workload(host.clone(), Rc::clone(&model), 3, 200, &[LOG; 5]))
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
    let mut opened = open_shards(host, recovered.incarnation, 1).await.expect("opens");
    let shard = opened.remove(0);
    shard.add_partition(LogState::new(key(0)), LOG);
    for n in 0..count {
        let _ = append_one(&shard, n).await;
    }
    // The ring's further slots are prewritten meanwhile; faults are meant for what comes after.
    host.sleep(Duration::from_millis(50)).await;
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
        host.sleep(Duration::from_secs(2)).await;
        let refused = append_one(&shard, 3).await.expect_err("no room");
        assert!(refused.contains("disk is full"), "{refused}");
        let records = shard.read(key(0), 0, 1 << 20, true).await.expect("reads go on");
        assert_eq!(records.next_offset, 3);
        host.inject(Fault::Full(u64::MAX));
        host.sleep(Duration::from_secs(2)).await;
        assert_eq!(append_one(&shard, 3).await, Ok(3));
    })
    .expect("ends");
}

#[test]
fn logs_of_the_broker_itself_go_on_in_the_space_that_is_kept_free() {
    let host = SimHost::new();
    host.run(async {
        let kept = 400 << 10;
        let config = ShardConfig {
            free_bytes_min: kept,
            ..config(0, 1)
        };
        recovery::recover(&host, &config, 1).await.expect("a new folder");
        let shard = Shard::open(host.clone(), config).await.expect("opened");
        let s = shard.clone();
        host.spawn(async move { s.run_commits().await });
        let s = shard.clone();
        host.spawn(async move { s.run_housekeeping().await });
        shard.add_partition(LogState::new(key(0)), LOG);
        let internal = LogConfig {
            is_internal: true,
            ..LOG
        };
        shard.add_partition(LogState::new(key(1)), internal);
        host.sleep(Duration::from_secs(2)).await;
        let free = async |bytes| {
            host.inject(Fault::Full(host.used() + bytes));
            host.sleep(Duration::from_secs(2)).await;
        };
        free(kept + (100 << 10)).await;
        append(&shard, 0, b"a client's").await.expect("room");
        free(kept / 2).await;
        append(&shard, 0, b"a client's").await.expect_err("no room");
        append(&shard, 1, b"a group's")
            .await
            .expect("that is what it is kept for");
        free(kept / 8).await;
        append(&shard, 1, b"a group's")
            .await
            .expect_err("a part is for metadata");
        free(kept / 2).await;
        append(&shard, 1, b"a group's").await.expect("room again");
    })
    .expect("ends");
}

#[test]
fn a_start_on_a_full_disk_takes_the_room_of_journal_files_that_hold_nothing() {
    let host = SimHost::new();
    host.run(async {
        let _shard = append_some(&host, 10).await;
        // The journal has all its files.
        host.sleep(Duration::from_secs(2)).await;
    })
    .expect("ends");
    let disk = host.after_kill();
    let full = disk.used();
    disk.inject(Fault::Full(full));
    disk.run(async {
        let keeps_room = ShardConfig {
            free_bytes_min: 200 << 10,
            ..config(0, 2)
        };
        let recovered = recovery::recover(&disk, &keeps_room, 1).await.expect("it starts");
        assert_eq!((recovered.replayed, recovered.partitions[0].log_end()), (10, 10));
        let shard = Shard::open(disk.clone(), keeps_room).await.expect("opened");
        let s = shard.clone();
        disk.spawn(async move { s.run_commits().await });
        let s = shard.clone();
        disk.spawn(async move { s.run_housekeeping().await });
        for log in recovered.partitions {
            shard.add_partition(log, LOG);
        }
        disk.sleep(Duration::from_secs(5)).await;
        assert!(
            disk.used() + config(0, 2).journal_slot_bytes < full,
            "the journal does not take back at once what was freed"
        );
        append_one(&shard, 10).await.expect_err("no room");
        disk.inject(Fault::Full(u64::MAX));
        disk.sleep(Duration::from_secs(5)).await;
        assert_eq!(append_one(&shard, 10).await, Ok(10));
        let records = shard.read(key(0), 0, 1 << 20, true).await.expect("all of them");
        assert_eq!(records.next_offset, 11);
        let (_, capacity) = shard.journal_usage();
        assert_eq!(capacity, 3 * (64 << 10), "it is whole again when there is room");
    })
    .expect("ends");
}

#[test]
fn a_stop_on_a_full_disk_leaves_the_rest_to_the_next_start() {
    let host = SimHost::new();
    host.run(async {
        let shard = append_some(&host, 20).await;
        host.sleep(Duration::from_secs(2)).await;
        host.inject(Fault::Full(host.used()));
        shard.close().await.expect("what is acknowledged is in the journal");
    })
    .expect("ends");
    let disk = host.after_kill();
    let recovered = disk
        .run(recovery::recover(&disk, &config(0, 0), 1))
        .expect("ends")
        .expect("sound");
    assert_eq!(recovered.partitions[0].log_end(), 20);
}

#[test]
fn a_folder_that_lacks_a_part_is_refused_by_name() {
    let host = SimHost::new();
    host.run(async {
        let shard = append_some(&host, 10).await;
        host.sleep(Duration::from_secs(2)).await;
        shard.flush_all().await.expect("flushed, with a checkpoint");
        append_one(&shard, 10).await.expect("appended");
    })
    .expect("ends");
    let without = |gone: &dyn Fn(&str) -> bool| {
        let disk = host.after_kill();
        disk.run(async {
            for path in disk.files() {
                if gone(path.to_str().expect("UTF-8")) {
                    disk.remove_file(&path).await.expect("removed");
                }
            }
            recovery::recover(&disk, &config(0, 0), 1).await
        })
        .expect("ends")
    };
    let missing = |gone: &dyn Fn(&str) -> bool| match without(gone) {
        Err(StorageError::Missing { path, .. }) => path.to_str().expect("UTF-8").to_owned(),
        other => panic!("{other:?}"),
    };
    assert!(without(&|_| false).is_ok());
    assert_eq!(missing(&|p| p.contains("/journal/")), "/data/journal/0000-0000.journal");
    assert_eq!(
        missing(&|p| p.ends_with("0000-0001.journal")),
        "/data/journal/0000-0001.journal"
    );
    assert_eq!(missing(&|p| p.contains("/checkpoint/")), "/data/checkpoint");
    assert_eq!(missing(&|p| p.ends_with("base.checkpoint")), "/data/checkpoint");

    // An empty file in its place says that what it held is given up.
    let disk = host.after_kill();
    let recovered = disk.run(async {
        let path = PathBuf::from("/data/journal/0000-0000.journal");
        let file = disk.open(&path, OpenMode::Durable).await.expect("opened");
        file.truncate(0).await.expect("emptied");
        recovery::recover(&disk, &config(0, 0), 1).await
    });
    let recovered = recovered.expect("ends").expect("what the segments hold");
    assert_eq!(recovered.partitions[0].log_end(), 10);
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

#[test]
fn a_segment_that_cannot_be_read_takes_its_partition_offline_for_appends_alone() {
    let host = SimHost::new();
    host.run(async {
        let shard = append_some(&host, 0).await;
        for n in 0..30 {
            append(&shard, 0, &[n; 3_000]).await.expect("appended");
        }
        shard.close().await.expect("closed");
    })
    .expect("ends");
    let host = host.after_kill();
    let segments: Vec<_> = (host.files().into_iter())
        .filter(|p| p.extension().is_some_and(|e| e == "segment"))
        .collect();
    assert!(segments.len() > 1);
    host.run(async {
        host.remove_file(&segments[0]).await.expect("removed");
        let recovered = recovery::recover(&host, &config(0, 0), 1)
            .await
            .expect("it is not read");
        let shard = open_shards(&host, recovered.incarnation, 1)
            .await
            .expect("opens")
            .remove(0);
        for state in recovered.partitions {
            shard.add_partition(state, LOG);
        }
        shard.add_partition(LogState::new(key(1)), LOG);
        append_one(&shard, 30).await.expect("nothing is known of it yet");
        shard.read(key(0), 0, 1_000, true).await.expect_err("gone");
        append_one(&shard, 31).await.expect_err("offline");
        let sound = shard
            .read(key(0), 29, 1 << 20, true)
            .await
            .expect("the rest can be read");
        assert_eq!(sound.next_offset, 31);
        append(&shard, 1, b"other").await.expect("others go on");
    })
    .expect("ends");
}
