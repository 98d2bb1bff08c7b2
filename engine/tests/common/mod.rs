//! A small shard on a simulated disk.
#![allow(dead_code, reason = "every test takes what it needs")]

pub mod history;

use std::path::PathBuf;

use bytes::Bytes;
use millrace_engine::{
    AppendError, BatchError, PartitionKey, StorageError,
    disk::sim::{SimHost, SimRng},
    host::Host,
    kafka_batch::{self, BatchInfo, NewRecord},
    log::LogConfig,
    shard::{RecordTimes, Shard, ShardConfig},
};
use uuid::Uuid;

/// Sizes at which rolling, write-back and eviction happen soon.
pub fn config(shard: u32, incarnation: u64) -> ShardConfig {
    ShardConfig {
        dir: PathBuf::from("/data"),
        shard,
        incarnation,
        journal_slot_bytes: 64 << 10,
        journal_slots: 3,
        direct_bytes_min: 6_000,
        room_ahead_min: 6 << 10,
        queue_bytes: 64 << 10,
        tail_bytes: 48 << 10,
        read_cache_bytes: 1 << 20,
        open_files: 4,
        sync_all_min: usize::MAX,
        free_bytes_min: 0,
        retention_check: std::time::Duration::from_secs(30),
        producer_expiration_ms: i64::MAX / 2,
        producers_max: 1_000,
    }
}

pub const LOG: LogConfig = LogConfig {
    is_internal: false,
    segment_bytes: 40 << 10,
    segment_ms: i64::MAX,
    retention_ms: -1,
    retention_bytes: -1,
    flush_messages: 1,
    flush_ms: i64::MAX,
};

pub fn key(partition: u32) -> PartitionKey {
    PartitionKey {
        topic: Uuid::from_u128(7),
        partition,
    }
}

/// Of a log without compressed batches.
pub struct Plain;

impl RecordTimes for Plain {
    async fn each(&self, _: &BatchInfo, _: Bytes, _: &mut dyn FnMut(i32, i64) -> bool) -> Result<(), BatchError> {
        unreachable!("nothing is compressed")
    }
}

/// Opens shards of a recovered folder, each with its task that commits.
///
/// # Errors
/// As [`Shard::open`].
pub async fn open_shards(host: &SimHost, incarnation: u64, shards: u32) -> Result<Vec<Shard<SimHost>>, StorageError> {
    let mut opened = Vec::new();
    for n in 0..shards {
        let shard = Shard::open(host.clone(), config(n, incarnation)).await?;
        let s = shard.clone();
        host.spawn(async move { s.run_commits().await });
        opened.push(shard);
    }
    Ok(opened)
}

/// 1 to `count`, or the one to be replayed.
pub fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("MILLRACE_SEED") {
        Ok(seed) => vec![seed.parse().expect("MILLRACE_SEED is a number")],
        Err(_) => (1..=count).collect(),
    }
}

/// What the cut of a run leaves: a killed process's disk one time in five, else what a power cut leaves of it.
pub fn after_cut(host: &SimHost, seed: u64, cut: u64) -> (SimHost, SimRng) {
    let mut rng = SimRng::new(seed ^ (cut << 20));
    let after = if cut.is_multiple_of(5) {
        host.after_kill()
    } else {
        host.after_power_cut(&mut rng)
    };
    (after, rng)
}

/// Appends one record and waits for its acknowledgement; its offset.
pub async fn append(shard: &Shard<SimHost>, partition: u32, value: &[u8]) -> Result<i64, String> {
    let record = NewRecord {
        value: Some(value.to_vec().into()),
        ..NewRecord::default()
    };
    let bytes = kafka_batch::build(&[record], (-1, -1, -1));
    let permit = shard.admit(bytes.len()).await;
    let batches = kafka_batch::split(bytes).expect("built");
    let appended = shard
        .append(key(partition), 1, batches, permit)
        .map_err(|e: AppendError| e.to_string())?;
    let done = shard.partition(&key(partition)).expect("there");
    done.wait_high_watermark(appended.end_offset)
        .await
        .map_err(|e: StorageError| e.to_string())?;
    Ok(appended.base_offset)
}
