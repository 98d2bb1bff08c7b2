//! Files that are needed no more: their names are free at once, they go in the background, and a crash leaves none for long.

mod common;

use std::{cell::Cell, path::Path, rc::Rc, time::Duration};

use common::{LOG, append, config, key, open_shards};
use millrace_engine::{
    ReadError,
    disk::sim::SimHost,
    host::{Host, HostFile, OpenMode},
    kafka_batch::{self, NewRecord},
    log::{LogConfig, LogState},
    recovery,
    shard::Shard,
};

const PARTITIONS: u32 = 40;

/// Names below a folder.
fn below(host: &SimHost, dir: &str) -> usize {
    host.files().iter().filter(|p| p.starts_with(dir)).count()
}

async fn start(host: &SimHost) -> Shard<SimHost> {
    let recovered = recovery::recover(host, &config(0, 0), 1).await.expect("sound");
    let shard = open_shards(host, recovered.incarnation, 1)
        .await
        .expect("opens")
        .remove(0);
    for state in recovered.partitions {
        shard.add_partition(state, LOG);
    }
    shard
}

/// A shard with a record in a segment of each of [`PARTITIONS`].
async fn start_with_partitions(host: &SimHost) -> Shard<SimHost> {
    let shard = start(host).await;
    for p in 0..PARTITIONS {
        shard.add_partition(LogState::new(key(p)), LOG);
        append(&shard, p, &[1; 500]).await.expect("appended");
    }
    shard.flush_all().await.expect("flushed");
    assert_eq!(below(host, "/data/logs"), PARTITIONS as usize);
    shard
}

async fn value_at(shard: &Shard<SimHost>, partition: u32, offset: i64, value: &[u8]) {
    let records = shard.read(key(partition), offset, 1, true).await.expect("read");
    assert!(records.bytes.windows(value.len()).any(|w| w == value));
}

#[test]
fn a_partition_that_comes_back_at_once_has_nothing_of_the_one_before() {
    let host = SimHost::new();
    let h = host.clone();
    host.run(async move {
        let shard = start(&h).await;
        for p in 0..2 {
            shard.add_partition(LogState::new(key(p)), LOG);
        }
        for n in 0..30_u8 {
            append(&shard, u32::from(n % 2), &[n; 5_000]).await.expect("appended");
        }
        shard.flush_all().await.expect("flushed");
        shard.remove_partition(&key(0), true);
        shard.add_partition(LogState::new(key(0)), LOG);
        shard.wait_cleared(&key(0)).await.expect("cleared");
        assert!(below(&h, "/data/removed") > 1, "in the background");
        assert_eq!(append(&shard, 0, &[0xaa; 5_000]).await, Ok(0));
        shard.flush_all().await.expect("flushed");
        h.sleep(Duration::from_secs(1)).await;
        assert_eq!(below(&h, "/data/removed"), 0);
        assert_eq!(shard.close().await.map_err(|e| e.to_string()), Ok(()));

        let shard = start(&h).await;
        let status = shard.partition(&key(0)).expect("there").status();
        assert_eq!((status.log_start, status.log_end), (0, 1));
        value_at(&shard, 0, 0, &[0xaa; 5_000]).await;
        for n in 0..15 {
            value_at(&shard, 1, i64::from(n), &[2 * n + 1; 5_000]).await;
        }
    })
    .expect("ends");
}

#[test]
fn what_a_crash_leaves_to_be_removed_the_next_start_removes() {
    let host = SimHost::new();
    let h = host.clone();
    host.run(async move {
        let shard = start_with_partitions(&h).await;
        for p in 0..PARTITIONS {
            shard.remove_partition(&key(p), p % 2 == 0);
        }
        while below(&h, "/data/removed") < PARTITIONS as usize / 4 {
            h.yield_now().await;
        }
    })
    .expect("ends");

    let host = host.after_kill();
    assert!(below(&host, "/data/removed") > 0, "killed before all was removed");
    let h = host.clone();
    host.run(async move {
        let shard = start(&h).await;
        // They are not in the metadata any more.
        for p in 0..PARTITIONS {
            shard.remove_partition(&key(p), false);
        }
        h.sleep(Duration::from_secs(5)).await;
        assert_eq!((below(&h, "/data/removed"), below(&h, "/data/logs")), (0, 0));
    })
    .expect("ends");
}

#[test]
fn records_of_a_deleted_partition_do_not_keep_the_next_start() {
    let host = SimHost::new();
    let h = host.clone();
    host.run(async move {
        let shard = start_with_partitions(&h).await;
        let bytes = kafka_batch::build(&[NewRecord::default()], (-1, -1, -1));
        let permit = shard.admit(bytes.len()).await;
        let batches = kafka_batch::split(bytes).expect("built");
        shard.append(key(3), 1, batches, permit).expect("sound");
        // On its way to the journal when a checkpoint is stored that knows nothing of the partition.
        shard.remove_partition(&key(3), false);
        shard.flush_all().await.expect("flushed");
    })
    .expect("ends");

    let host = host.after_kill();
    let h = host.clone();
    host.run(async move {
        let shard = start(&h).await;
        let there = shard.partitions();
        assert!(there.iter().all(|p| p.key != key(3) || p.status().log_end == 0));
        for p in (0..PARTITIONS).filter(|p| *p != 3) {
            value_at(&shard, p, 0, &[1; 500]).await;
        }
    })
    .expect("ends");
}

#[test]
fn a_stop_leaves_no_deleted_partition_under_its_name() {
    let host = SimHost::new();
    let h = host.clone();
    host.run(async move {
        let shard = start_with_partitions(&h).await;
        for p in 0..PARTITIONS {
            shard.remove_partition(&key(p), false);
        }
        shard.close().await.expect("closed");
        assert_eq!(below(&h, "/data/logs"), 0);
    })
    .expect("ends");
}

#[test]
fn readers_of_what_retention_removes_do_no_harm() {
    const VALUE: usize = 400_000;
    let host = SimHost::new();
    let h = host.clone();
    host.run(async move {
        let shard = start(&h).await;
        let log = LogConfig {
            segment_bytes: 12 << 20,
            ..LOG
        };
        shard.add_partition(LogState::new(key(0)), log);
        for n in 0..90_u8 {
            append(&shard, 0, &vec![n; VALUE]).await.expect("appended");
        }
        shard.flush_all().await.expect("flushed");
        let partition = shard.partition(&key(0)).expect("there");
        // They read everything over and over, each from another record on.
        let (refused, stop) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(false)));
        for reader in 0..10 {
            let (shard, refused, stop) = (shard.clone(), Rc::clone(&refused), Rc::clone(&stop));
            h.spawn(async move {
                let mut next = 3 * reader;
                while !stop.get() {
                    match shard.read(key(0), next, 1, true).await {
                        Ok(records) => {
                            assert!(records.bytes.windows(1_000).any(|w| w == [next as u8; 1_000]));
                            next = if records.next_offset < 90 {
                                records.next_offset
                            } else {
                                records.log_start
                            };
                        }
                        Err(ReadError::OffsetOutOfRange { log_start, .. }) => {
                            refused.set(refused.get() + 1);
                            next = log_start;
                        }
                        Err(other) => panic!("{other}"),
                    }
                }
            });
        }
        for to in 1..70 {
            shard.delete_records(&partition, to).await.expect("moved");
            for _ in 0..20 {
                h.yield_now().await;
            }
        }
        stop.set(true);
        h.sleep(Duration::from_secs(1)).await;
        assert!(refused.get() > 0, "nobody read what went");
        assert_eq!(below(&h, "/data/removed"), 0);
        assert_eq!(append(&shard, 0, b"sound").await, Ok(90));
    })
    .expect("ends");
}

#[test]
fn a_large_file_goes_piece_by_piece() {
    const FILE: &str = "/data/removed/0-0-0";
    let host = SimHost::new();
    let h = host.clone();
    host.run(async move {
        h.create_dir(Path::new("/data/removed")).await.expect("made");
        let file = h.open(Path::new(FILE), OpenMode::Create).await.expect("made");
        file.write_at(h.buffer(20 << 20), 0).await.expect("written");
        let _shard = start(&h).await;
        let mut lengths = vec![20 << 20];
        while below(&h, "/data/removed") > 0 {
            h.sleep(Duration::from_millis(1)).await;
            if below(&h, "/data/removed") > 0 {
                lengths.push(h.contents(Path::new(FILE)).len());
            }
        }
        lengths.dedup();
        assert!(lengths.windows(2).all(|w| w[0] - w[1] <= 4 << 20), "{lengths:?}");
    })
    .expect("ends");
}
