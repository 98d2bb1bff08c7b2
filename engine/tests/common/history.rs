//! What a client knows of the logs it wrote, and whether recovery brought that back.

use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

use bytes::Bytes;
use millrace_engine::{
    AppendError,
    disk::sim::{SimHost, SimRng},
    kafka_batch::{self, NewRecord},
    recovery::{self, Recovered},
    shard::Shard,
};

use super::{LOG, after_cut, config, key, open_shards};

/// What a client knows: each partition's batches in order of offset, and how far they were acknowledged.
#[derive(Default)]
pub struct Model {
    pub sent: BTreeMap<u32, Vec<(i64, Bytes)>>,
    pub acked_end: BTreeMap<u32, i64>,
    pub log_start: BTreeMap<u32, i64>,
}

pub fn payload(rng: &mut SimRng, tag: u64) -> Bytes {
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

impl Model {
    /// Appends a batch; what is returned notes its acknowledgement.
    ///
    /// # Errors
    /// As [`Shard::append`].
    pub async fn append(
        model: &Rc<RefCell<Self>>,
        shard: &Shard<SimHost>,
        p: u32,
        bytes: Bytes,
    ) -> Result<impl Future<Output = ()> + 'static, AppendError> {
        let permit = shard.admit(bytes.len()).await;
        let batches = kafka_batch::split(bytes.clone()).expect("built above");
        let appended = shard.append(key(p), 1, batches, permit)?;
        let sent = (appended.base_offset, bytes);
        model.borrow_mut().sent.entry(p).or_default().push(sent);
        let (model, partition) = (Rc::clone(model), shard.partition(&key(p)).expect("just appended to"));
        Ok(async move {
            if partition.wait_high_watermark(appended.end_offset).await.is_ok() {
                let mut model = model.borrow_mut();
                let end = model.acked_end.entry(p).or_default();
                *end = (*end).max(appended.end_offset);
            }
        })
    }
}

/// The offset behind a batch sent.
pub fn end_of((base, bytes): &(i64, Bytes)) -> i64 {
    let (info, _) = kafka_batch::parse(bytes).expect("sent");
    base + i64::from(info.record_count)
}

/// What clients are to be given of batches sent, between two offsets.
pub fn served(sent: &[(i64, Bytes)], log_start: i64, log_end: i64) -> Vec<u8> {
    let mut served = Vec::new();
    for batch in sent {
        let (base, bytes) = batch;
        let end = end_of(batch);
        if end > log_start && end <= log_end {
            let at = served.len();
            served.extend_from_slice(bytes);
            served[at..at + 8].copy_from_slice(&base.to_be_bytes());
            served[at + 12..at + 16].copy_from_slice(&1_i32.to_be_bytes());
        }
    }
    served
}

/// All that can be read of a partition.
pub async fn contents(shard: &Shard<SimHost>, p: u32) -> Result<Vec<u8>, String> {
    let status = shard.partition(&key(p)).expect("added").status();
    let mut got = Vec::new();
    let mut next = status.log_start;
    while next < status.log_end {
        let records = shard.read(key(p), next, 10_000, true).await;
        let records = records.map_err(|e| format!("offset {next}: {e}"))?;
        if records.next_offset <= next {
            return Err(format!("no progress at {next}"));
        }
        got.extend_from_slice(&records.bytes);
        next = records.next_offset;
    }
    Ok(got)
}

/// Opens what recovery gave on `shards` shards and checks it against the model; goes on appending afterwards.
pub async fn verify(host: SimHost, recovered: Recovered, model: &Model, shards: u32, context: &str) {
    let opened = open_shards(&host, recovered.incarnation, shards).await.expect("opens");
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
        let expected = served(&model.sent[p], status.log_start, status.log_end);
        let got = contents(shard, *p)
            .await
            .unwrap_or_else(|e| panic!("{context}: partition {p}: {e}"));
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

/// Recovers what a cut left of a run, on one to three shards, and checks it.
pub fn verify_after_cut(host: &SimHost, model: &Model, seed: u64, cut: u64) {
    let context = format!("seed {seed} cut {cut}");
    let (after, _) = after_cut(host, seed, cut);
    let shards = 1 + (cut % 3) as u32;
    let recovered = after
        .run(recovery::recover(&after, &config(0, 0), shards))
        .unwrap_or_else(|| panic!("{context}: recovery does not end"))
        .unwrap_or_else(|e| panic!("{context}: {e}"));
    after
        .run(verify(after.clone(), recovered, model, shards, &context))
        .unwrap_or_else(|| panic!("{context}: stuck"));
}
