//! What our own code costs between a request's bytes and its acknowledgement, and between a fetch and its bytes: the disk
//! here takes everything and does nothing. `cargo bench -p millrace-engine`.

use std::{
    cell::RefCell,
    future::Future,
    hint::black_box,
    io,
    path::{Path, PathBuf},
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use millrace_engine::{
    PartitionKey,
    host::{Host, HostFile, OpenMode},
    kafka_batch::{self, NewRecord},
    log::{LogConfig, LogState},
    shard::{Shard, ShardConfig},
};
use uuid::Uuid;

type Task = Pin<Box<dyn Future<Output = ()>>>;

#[derive(Clone, Default)]
struct NullHost(Rc<RefCell<Vec<Task>>>);

struct NullFile;

impl HostFile for NullFile {
    type Buf = Vec<u8>;

    async fn write_at(&self, buf: Vec<u8>, _: u64) -> io::Result<()> {
        black_box(buf);
        Ok(())
    }

    async fn write_durable_at(&self, buf: Vec<u8>, _: u64) -> io::Result<()> {
        black_box(buf);
        Ok(())
    }

    async fn read_behind(&self, mut memory: BytesMut, _: u64, len: usize) -> io::Result<BytesMut> {
        memory.resize(memory.len() + len, 0);
        Ok(memory)
    }

    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    async fn make_room(&self, _: u64) -> io::Result<()> {
        Ok(())
    }
    async fn truncate(&self, _: u64) -> io::Result<()> {
        Ok(())
    }

    async fn size(&self) -> io::Result<u64> {
        Ok(0)
    }
}

impl Host for NullHost {
    type File = NullFile;

    fn buffer(&self, len: usize) -> Vec<u8> {
        vec![0; len]
    }

    async fn aside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        work()
    }

    async fn open(&self, _: &Path, _: OpenMode) -> io::Result<NullFile> {
        Ok(NullFile)
    }

    async fn create_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, _: &Path) -> io::Result<Vec<String>> {
        Ok(Vec::new())
    }

    async fn remove_file(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    async fn remove_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn rename(&self, _: &Path, _: &Path) -> io::Result<()> {
        Ok(())
    }

    async fn sync_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    async fn sync_all(&self) -> io::Result<()> {
        Ok(())
    }

    fn free_space(&self, _: &Path) -> io::Result<u64> {
        Ok(1 << 40)
    }

    fn now_ms(&self) -> i64 {
        1_700_000_000_000
    }

    async fn sleep(&self, _: Duration) {
        std::future::pending::<()>().await;
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.0.borrow_mut().push(Box::pin(task));
    }

    async fn yield_now(&self) {}
}

impl NullHost {
    /// Polls everything in turn until `main` is done.
    fn run<T>(&self, main: impl Future<Output = T>) -> T {
        let mut main = pin!(main);
        let mut cx = Context::from_waker(Waker::noop());
        loop {
            if let Poll::Ready(value) = main.as_mut().poll(&mut cx) {
                return value;
            }
            let mut tasks = std::mem::take(&mut *self.0.borrow_mut());
            tasks.retain_mut(|task| task.as_mut().poll(&mut cx).is_pending());
            self.0.borrow_mut().append(&mut tasks);
        }
    }
}

fn shard(partitions: u32) -> (NullHost, Shard<NullHost>) {
    let host = NullHost::default();
    let config = ShardConfig {
        dir: PathBuf::from("/null"),
        shard: 0,
        incarnation: 1,
        journal_slot_bytes: 8 << 20,
        journal_slots: 8,
        direct_bytes_min: 64 << 10,
        room_ahead_min: 256 << 10,
        queue_bytes: 64 << 20,
        tail_bytes: 64 << 20,
        read_cache_bytes: 8 << 20,
        open_files: 64,
        sync_all_min: 32,
        free_bytes_min: 0,
        retention_check: std::time::Duration::from_secs(30),
        producer_expiration_ms: i64::MAX / 2,
        producers_max: 1_000,
    };
    let opened = host.run(Shard::open(host.clone(), config)).expect("nothing fails here");
    let s = opened.clone();
    host.spawn(async move { s.run_commits().await });
    for partition in 0..partitions {
        opened.add_partition(LogState::new(key(partition)), LogConfig::default());
    }
    (host, opened)
}

fn key(partition: u32) -> PartitionKey {
    PartitionKey {
        topic: Uuid::from_u128(1),
        partition,
    }
}

fn batch(bytes: usize) -> Bytes {
    let record = NewRecord {
        key: None,
        value: Some(Bytes::from(vec![7; bytes])),
        timestamp: 1_700_000_000_000,
    };
    kafka_batch::build(&[record], (-1, -1, -1))
}

async fn append(shard: &Shard<NullHost>, partition: u32, records: &Bytes) -> i64 {
    let batches = kafka_batch::split(records.clone()).expect("sound");
    let permit = shard.admit(records.len()).await;
    shard
        .append(key(partition), 0, batches, permit)
        .expect("appended")
        .end_offset
}

fn appends(c: &mut Criterion) {
    let mut group = c.benchmark_group("parse, append, acknowledge");
    for bytes in [100, 1_000, 16_000, 120_000] {
        let (host, shard) = shard(1);
        let records = batch(bytes);
        group.throughput(Throughput::Bytes(records.len() as u64));
        group.bench_with_input(BenchmarkId::new("one batch, bytes", bytes), &records, |b, records| {
            b.iter(|| {
                host.run(async {
                    let end = append(&shard, 0, records).await;
                    let partition = shard.partition(&key(0)).expect("added");
                    partition.wait_high_watermark(end).await.expect("acknowledged");
                });
            });
        });
    }
    group.finish();
    let mut group = c.benchmark_group("a round of one small batch to each partition");
    for partitions in [1_u32, 32, 1024] {
        let (host, shard) = shard(partitions);
        let records = batch(100);
        group.throughput(Throughput::Elements(u64::from(partitions)));
        group.bench_with_input(BenchmarkId::new("partitions", partitions), &records, |b, records| {
            b.iter(|| {
                host.run(async {
                    let mut ends = Vec::with_capacity(partitions as usize);
                    for p in 0..partitions {
                        ends.push(append(&shard, p, records).await);
                    }
                    for (p, end) in ends.into_iter().enumerate() {
                        let partition = shard.partition(&key(p as u32)).expect("added");
                        partition.wait_high_watermark(end).await.expect("acknowledged");
                    }
                });
            });
        });
    }
    group.finish();
}

fn fetches(c: &mut Criterion) {
    let mut group = c.benchmark_group("fetch from memory");
    let (host, shard) = shard(1);
    let records = batch(1_000);
    host.run(async {
        let mut end = 0;
        for _ in 0..2_000 {
            end = append(&shard, 0, &records).await;
        }
        let partition = shard.partition(&key(0)).expect("added");
        partition.wait_high_watermark(end).await.expect("acknowledged");
    });
    for bytes in [2_000, 64_000, 1_000_000] {
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_with_input(BenchmarkId::new("bytes", bytes), &bytes, |b, bytes| {
            b.iter(|| host.run(shard.read(key(0), 100, *bytes, true)).expect("records"));
        });
    }
    group.finish();
}

criterion_group!(benches, appends, fetches);
criterion_main!(benches);
