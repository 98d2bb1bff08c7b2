//! What a shard remembers of idempotent producers: over a restart, and no more of them than it may.

mod common;

use common::{LOG, config, key, open_shards};
use millrace_engine::{
    AppendError,
    disk::sim::SimHost,
    host::Host,
    kafka_batch::{self, NewRecord},
    log::LogState,
    recovery,
    shard::{Appended, Shard, ShardConfig},
};

const PARTITIONS: u32 = 3;
const PRODUCERS_MAX: usize = 40;

/// Appends a batch of one record, as `producer` numbers it, and waits until it is durable.
async fn send(shard: &Shard<SimHost>, partition: u32, producer: i64, sequence: i32) -> Result<Appended, AppendError> {
    let record = NewRecord {
        value: Some(b"value".as_slice().into()),
        ..NewRecord::default()
    };
    let bytes = kafka_batch::build(&[record], (producer, 0, sequence));
    let permit = shard.admit(bytes.len()).await;
    let appended = shard.append(key(partition), 1, kafka_batch::split(bytes)?, permit)?;
    let there = shard.partition(&key(partition)).expect("added");
    there.wait_high_watermark(appended.end_offset).await?;
    Ok(appended)
}

fn remembered(shard: &Shard<SimHost>) -> usize {
    let of = |p| {
        shard
            .partition(&key(p))
            .expect("added")
            .with_state(|s| s.producers.len())
    };
    (0..PARTITIONS).map(of).sum()
}

#[test]
fn a_retry_is_known_after_a_restart_however_many_producers_there_are() {
    let host = SimHost::new();
    let h = host.clone();
    host.run(async move {
        let new = recovery::recover(&h, &config(0, 0), 1).await.expect("sound");
        let shard = open_shards(&h, new.incarnation, 1).await.expect("opens").remove(0);
        shard.add_partition(LogState::new(key(0)), LOG);
        let mut offsets = Vec::new();
        for producer in 0..300 {
            offsets.push(send(&shard, 0, producer, 7).await.expect("appended").base_offset);
            if producer % 100 == 50 {
                shard.flush_all().await.expect("flushed");
            }
        }
        // The last ones are in the journal only, the others in a checkpoint.
        let recovered = recovery::recover(&h, &config(0, 0), 1).await.expect("sound");
        let shard = open_shards(&h, recovered.incarnation, 1)
            .await
            .expect("opens")
            .remove(0);
        for state in recovered.partitions {
            shard.add_partition(state, LOG);
        }
        for (producer, offset) in (0..).zip(offsets) {
            let again = send(&shard, 0, producer, 7).await.expect("answered");
            assert_eq!(
                (again.duplicate, again.base_offset),
                (true, offset),
                "producer {producer}"
            );
        }
    })
    .expect("ends");
}

#[test]
fn a_shard_forgets_those_that_have_been_idle() {
    let host = SimHost::new();
    let h = host.clone();
    host.run(async move {
        let config = ShardConfig {
            producers_max: PRODUCERS_MAX,
            ..config(0, 1)
        };
        let shard = Shard::open(h.clone(), config).await.expect("opens");
        let s = shard.clone();
        h.spawn(async move { s.run_commits().await });
        for p in 0..PARTITIONS {
            shard.add_partition(LogState::new(key(p)), LOG);
        }
        let last = 3 * PRODUCERS_MAX as i64;
        for producer in 1..=last {
            for p in 0..PARTITIONS {
                send(&shard, p, producer, 0).await.expect("appended");
                assert!(remembered(&shard) <= PRODUCERS_MAX, "{}", remembered(&shard));
            }
            // One of them writes all the time.
            send(&shard, 0, 0, producer as i32).await.expect("appended");
        }
        assert!(send(&shard, 0, 0, last as i32).await.expect("answered").duplicate);
        for p in 0..PARTITIONS {
            assert!(send(&shard, p, last, 0).await.expect("answered").duplicate);
            assert!(
                !send(&shard, p, 1, 0).await.expect("appended").duplicate,
                "forgotten long ago"
            );
        }
        // Where a partition goes, so does what was remembered of it.
        shard.let_go(&key(2)).await.expect("stored");
        let there = |p| {
            shard
                .partition(&key(p))
                .expect("added")
                .with_state(|s| s.producers.len())
        };
        let before = there(0) + there(1);
        send(&shard, 1, last + 1, 0).await.expect("appended");
        assert_eq!(there(0) + there(1), before + 1);
    })
    .expect("ends");
}
