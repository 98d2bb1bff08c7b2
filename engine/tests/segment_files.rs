//! The whole life of segment files on a real disk: appended to, rolled, written back, read and moved between shards while retention and
//! deletion take them away. Nothing of that is a failure of the disk, and nothing stays that nobody needs.
#![cfg(feature = "glommio")]

mod common;

use std::{
    cell::{Cell, RefCell},
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant},
};

use common::LOG;
use glommio::{Latency, LocalExecutorBuilder, Placement, Shares};
use millrace_engine::{
    AppendError, PartitionKey, ReadError, StorageError,
    disk::glommio::{GlommioHost, helpers},
    host::{Host, HostFile, OpenMode},
    kafka_batch::{self, NewRecord},
    log::LogState,
    shard::{Shard, ShardConfig},
};
use uuid::Uuid;

const PARTITIONS: u32 = 4;
/// Three of them fill a segment.
const VALUE: usize = 12_000;
const RUN: Duration = Duration::from_secs(3);

type Engine = Shard<GlommioHost>;

fn kept() -> PartitionKey {
    common::key(0)
}

fn key(partition: u32) -> PartitionKey {
    PartitionKey { partition, ..kept() }
}

/// A folder on the disk that the build is on: direct I/O is what is tested.
fn folder(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("made");
    dir
}

/// Runs on an executor as the broker's shards have, and removes the folder.
fn run<F: Future<Output = ()> + 'static>(name: &str, work: impl FnOnce(GlommioHost, PathBuf) -> F + Send + 'static) {
    let dir = folder(name);
    let inside = dir.clone();
    LocalExecutorBuilder::new(Placement::Unbound)
        .blocking_thread_pool_placement(helpers(&[0, 1]).expect("cores"))
        .spawn(move || async move {
            let background =
                glommio::executor().create_task_queue(Shares::Static(200), Latency::NotImportant, "background");
            let host = GlommioHost::new(background, &[0, 1], &inside).expect("a ring");
            work(host, inside).await;
            millrace_engine::disk::glommio::settle().await;
        })
        .expect("starts")
        .join()
        .expect("no panic");
    std::fs::remove_dir_all(dir).expect("removed");
}

async fn open(host: &GlommioHost, dir: &Path, shard: u32) -> Engine {
    let config = ShardConfig {
        dir: dir.to_owned(),
        shard,
        journal_slot_bytes: 1 << 20,
        queue_bytes: 1 << 20,
        tail_bytes: 512 << 10,
        open_files: 8,
        sync_all_min: 3,
        ..common::config(shard, 1)
    };
    let engine = Shard::open(host.clone(), config).await.expect("opens");
    let commits = engine.clone();
    host.spawn(async move { commits.run_commits().await });
    engine
}

/// Appends a record; `None` if the partition is elsewhere, or gone.
async fn append(engine: &Engine, key: PartitionKey, n: i64) -> Option<i64> {
    let mut value = vec![key.partition as u8; VALUE];
    value[..8].copy_from_slice(&n.to_be_bytes());
    let record = NewRecord {
        value: Some(value.into()),
        ..NewRecord::default()
    };
    let bytes = kafka_batch::build(&[record], (-1, -1, -1));
    let permit = engine.admit(bytes.len()).await;
    let partition = engine.partition(&key)?;
    let batches = kafka_batch::split(bytes).expect("built");
    let appended = match engine.append(key, 1, batches, permit) {
        Ok(appended) => appended,
        Err(AppendError::UnknownPartition(_))
        | Err(AppendError::Storage(StorageError::Moving | StorageError::Left)) => return None,
        Err(error) => panic!("{key}: {error}"),
    };
    match partition.wait_high_watermark(appended.end_offset).await {
        Ok(()) => Some(appended.base_offset),
        Err(StorageError::Left) => None,
        Err(error) => panic!("{key}: {error}"),
    }
}

async fn go(from: &Engine, to: &Engine, key: PartitionKey) {
    let partition = from.partition(&key).expect("it is there");
    from.hold(&partition).expect("sound");
    let state = from.settle(&partition).await.expect("settled");
    to.adopt(state, partition.config()).await.expect("adopted");
    from.let_go(&key).await.expect("let go");
    to.resume(&to.partition(&key).expect("adopted"));
}

/// Names of files below a folder, and of folders without anything.
fn leaves(dir: &Path) -> Vec<PathBuf> {
    let entries: Vec<_> = std::fs::read_dir(dir)
        .expect("listed")
        .map(|e| e.expect("an entry").path())
        .collect();
    let mut out = Vec::new();
    for path in entries {
        let below = if path.is_dir() { leaves(&path) } else { Vec::new() };
        if below.is_empty() {
            out.push(path);
        } else {
            out.extend(below);
        }
    }
    out
}

#[test]
fn segments_go_while_they_are_written_read_and_moved() {
    run("lives", |host, dir| async move {
        let shards = Rc::new([open(&host, &dir, 0).await, open(&host, &dir, 1).await]);
        let homes: Rc<RefCell<Vec<usize>>> = Rc::new(RefCell::new((0..PARTITIONS as usize).map(|p| p % 2).collect()));
        for p in 0..PARTITIONS {
            shards[p as usize % 2].add_partition(LogState::new(key(p)), LOG);
        }
        let until = Instant::now() + RUN;
        let (appended, refused, moved) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
        let mut tasks = Vec::new();
        for p in 0..PARTITIONS {
            let home = {
                let (shards, homes) = (Rc::clone(&shards), Rc::clone(&homes));
                move || shards[homes.borrow()[p as usize]].clone()
            };
            let (at, count) = (home.clone(), Rc::clone(&appended));
            tasks.push(glommio::spawn_local(async move {
                let mut next = 0;
                while Instant::now() < until {
                    match append(&at(), key(p), next).await {
                        Some(offset) => {
                            assert_eq!(offset, next, "partition {p}");
                            next += 1;
                            count.set(count.get() + 1);
                        }
                        None => glommio::timer::sleep(Duration::from_millis(1)).await,
                    }
                }
            }));
            let at = home.clone();
            tasks.push(glommio::spawn_local(async move {
                while Instant::now() < until {
                    if let Some(partition) = at().partition(&key(p)) {
                        let to = partition.status().high_watermark;
                        match at().delete_records(&partition, to).await {
                            Ok(_) | Err(StorageError::Moving | StorageError::Left) => {}
                            Err(error) => panic!("partition {p}: {error}"),
                        }
                    }
                    glommio::timer::sleep(Duration::from_millis(2)).await;
                }
            }));
            let (at, count) = (home.clone(), Rc::clone(&refused));
            tasks.push(glommio::spawn_local(async move {
                let mut next = 0;
                while Instant::now() < until {
                    match at().read(key(p), next, VALUE, true).await {
                        Ok(records) if records.next_offset > next => {
                            assert!(records.bytes.windows(8).any(|w| w == next.to_be_bytes()));
                            next = records.next_offset;
                        }
                        Ok(_) => glommio::timer::sleep(Duration::from_millis(1)).await,
                        Err(ReadError::OffsetOutOfRange { log_start, .. }) => {
                            count.set(count.get() + 1);
                            next = log_start;
                        }
                        Err(ReadError::UnknownPartition(_)) => glommio::timer::sleep(Duration::from_millis(1)).await,
                        Err(error) => panic!("partition {p}: {error}"),
                    }
                }
            }));
        }
        for n in 0..shards.len() {
            let shard = shards[n].clone();
            tasks.push(glommio::spawn_local(async move {
                while Instant::now() < until {
                    shard.flush_all().await.expect("the disk is sound");
                    glommio::executor().yield_task_queue_now().await;
                }
            }));
        }
        let (s, h, count) = (Rc::clone(&shards), Rc::clone(&homes), Rc::clone(&moved));
        tasks.push(glommio::spawn_local(async move {
            while Instant::now() < until {
                let from = h.borrow()[0];
                go(&s[from], &s[1 - from], key(0)).await;
                h.borrow_mut()[0] = 1 - from;
                count.set(count.get() + 1);
                glommio::timer::sleep(Duration::from_millis(20)).await;
            }
        }));
        // Topics that are made, written to and deleted.
        for topic in 0..3 {
            let (shard, host) = (shards[topic % 2].clone(), host.clone());
            tasks.push(glommio::spawn_local(async move {
                let mut n = 0;
                while Instant::now() < until {
                    let key = PartitionKey {
                        topic: Uuid::from_u128(1_000 + 1_000_000 * topic as u128 + n),
                        partition: 0,
                    };
                    n += 1;
                    shard.add_partition(LogState::new(key), LOG);
                    for record in 0..4 {
                        append(&shard, key, record).await.expect("it is there");
                    }
                    if n % 3 == 0 {
                        host.sleep(Duration::from_micros(n as u64 % 1_000)).await;
                    }
                    shard.remove_partition(&key, n % 4 == 0);
                }
            }));
        }
        for task in tasks {
            task.await;
        }
        assert!(
            appended.get() > 100 && moved.get() > 5,
            "{} appended, {} moved",
            appended.get(),
            moved.get()
        );
        for (p, home) in homes.borrow().iter().enumerate() {
            let partition = shards[*home].partition(&key(p as u32)).expect("there");
            partition.check_healthy().expect("nothing took it offline");
        }
        for shard in shards.iter() {
            assert_eq!(shard.poisoned(), None);
            shard.flush_all().await.expect("sound");
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline && !leaves(&dir.join("removed")).is_empty() {
            glommio::timer::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(leaves(&dir.join("removed")), Vec::<PathBuf>::new());
        let logs = dir.join("logs");
        let wanted: Vec<PathBuf> = homes
            .borrow()
            .iter()
            .enumerate()
            .flat_map(|(p, home)| {
                let key = key(p as u32);
                let partition = shards[*home].partition(&key).expect("there");
                let bases: Vec<i64> = partition.with_state(|s| s.segments().iter().map(|s| s.base).collect());
                let dir = logs.join(key.topic.simple().to_string()).join(p.to_string());
                bases
                    .into_iter()
                    .flat_map(move |base| ["segment", "index"].map(|kind| dir.join(format!("{base:020}.{kind}"))))
            })
            .collect();
        let stray: Vec<PathBuf> = leaves(&logs).into_iter().filter(|p| !wanted.contains(p)).collect();
        assert_eq!(stray, Vec::<PathBuf>::new(), "files that nobody needs");
        for shard in shards.iter() {
            shard.close().await.expect("closes");
        }
    });
}

#[test]
fn a_file_that_loses_its_name_while_it_is_opened_is_open() {
    run("names", |host, dir| async move {
        let (path, other) = (dir.join("here"), dir.join("there"));
        for _ in 0..300 {
            std::fs::write(&path, b"x").expect("written");
            let stop = Rc::new(Cell::new(false));
            let (h, p, s) = (host.clone(), path.clone(), Rc::clone(&stop));
            let opening = glommio::spawn_local(async move {
                let file = h.open(&p, OpenMode::Existing).await;
                s.set(true);
                file
            });
            // At any moment of it.
            let (from, to) = (path.clone(), other.clone());
            host.aside(move || {
                std::thread::sleep(Duration::from_micros(30));
                std::fs::rename(&from, &to).and_then(|()| std::fs::remove_file(&to))
            })
            .await
            .expect("removed");
            match opening.await {
                Ok(file) => assert_eq!(file.size().await.expect("known"), 1),
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound),
            }
        }
    });
}
