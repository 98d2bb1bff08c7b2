//! What a batch must be to be appended: the topic's limits, times and codec, and records that can be read. As Kafka's `LogValidator`.
//!
//! A compressed batch is opened once, piece by piece; nothing of it is kept. Nothing that the header states of its records is believed:
//! counts, offsets and times are those of the records.

use std::{cell::RefCell, collections::HashMap, rc::Rc};

use bytes::Bytes;
use kafka_protocol::ResponseError;
use millrace_cluster::metadata::{ConfigResource, TopicImage};
use millrace_engine::{
    BatchError,
    host::Host,
    kafka_batch::{self, BATCH_HEADER_LEN, BatchInfo, NO_TIMESTAMP, Times},
    record_walk::RecordWalk,
};
use millrace_net::kafka::compression::{self, CompressionError, Level, Unpacker};
use uuid::Uuid;

use super::errors::Failure;
use crate::node::{Node, View, topic_setting};

/// Bytes unpacked before others have their turn: about a tenth of a millisecond.
pub(super) const TURN: usize = 256 << 10;
/// A batch that unpacks to more is packed anew by a helper thread.
const REPACKED_HERE: usize = 64 << 10;
/// Records named in one answer.
const NAMED_MAX: usize = 100;

/// Why a batch was not taken, and because of which of its records.
#[derive(Debug)]
pub struct Refused {
    /// Why.
    pub failure: Failure,
    /// Indexes of the records, and what is wrong with each (KIP-467); none if it is the batch as a whole.
    pub records: Vec<(i32, String)>,
}

impl<E: Into<Failure>> From<E> for Refused {
    fn from(error: E) -> Self {
        Self {
            failure: error.into(),
            records: Vec::new(),
        }
    }
}

/// The settings of a topic that a batch must meet.
pub struct Rules {
    max_bytes: usize,
    /// `message.timestamp.type=LogAppendTime`.
    pub append_time: bool,
    /// What batches are packed with, if not as they come.
    codec: Option<(i16, Level)>,
    before_max_ms: i64,
    after_max_ms: i64,
    /// Replicas in sync that an acknowledgement by all takes.
    pub min_insync: usize,
    unpack_max: usize,
}

/// The rules of topics as of one version of the metadata: to look each setting up takes longer than to check a batch.
#[derive(Default)]
pub struct KnownRules {
    version: u64,
    of: HashMap<Uuid, Rc<Rules>>,
}

impl KnownRules {
    /// Those of a topic.
    pub fn get(known: &RefCell<Self>, node: &Node, view: &View, topic: &TopicImage) -> Rc<Rules> {
        let mut known = known.borrow_mut();
        if known.version != view.image.version {
            known.of.clear();
            known.version = view.image.version;
        }
        let rules = known.of.entry(topic.id);
        Rc::clone(rules.or_insert_with(|| Rc::new(Rules::of(node, view, &topic.name))))
    }
}

impl Rules {
    fn of(node: &Node, view: &View, topic: &str) -> Self {
        let resource = ConfigResource::Topic(topic.to_owned());
        let get = |name| topic_setting(&node.shared.settings, &view.image, &resource, name);
        let number = |name| get(name).parse::<i64>().unwrap_or(i64::MAX);
        Self {
            max_bytes: number("max.message.bytes") as usize,
            append_time: get("message.timestamp.type") == "LogAppendTime",
            codec: match get("compression.type") {
                "uncompressed" => Some((0, Level::DEFAULT)),
                "gzip" => Some((1, Level(number("compression.gzip.level") as i32))),
                "snappy" => Some((2, Level::DEFAULT)),
                "lz4" => Some((3, Level(number("compression.lz4.level") as i32))),
                "zstd" => Some((4, Level(number("compression.zstd.level") as i32))),
                _ => None,
            },
            before_max_ms: number("message.timestamp.before.max.ms"),
            after_max_ms: number("message.timestamp.after.max.ms"),
            min_insync: number("min.insync.replicas") as usize,
            unpack_max: (node.shared.settings.number("decompress.max.bytes"))
                .min(number("max.decompressed.message.bytes")) as usize,
        }
    }
}

/// Checks a batch that a client sent, and makes it what the topic wants. Returns what is appended.
///
/// # Errors
/// [`Refused`].
pub async fn batch(
    node: &Rc<Node>,
    info: BatchInfo,
    batch: Bytes,
    rules: &Rules,
    now: i64,
) -> Result<(BatchInfo, Bytes), Refused> {
    check_header(&info, &batch, rules)?;
    let mut late = OutOfRange {
        rules,
        now,
        named: Vec::new(),
    };
    let (times, unpacked) = if info.compression() == 0 {
        let times = info.times();
        if late.is_among(times) {
            kafka_batch::for_each_record(&batch[BATCH_HEADER_LEN..], &info, |record| {
                late.note(record.offset_delta, record.timestamp);
                true
            })?;
        }
        (times, batch.len() - BATCH_HEADER_LEN)
    } else {
        let mut unpacker = node.unpackers.take();
        let opened = open(node, &mut unpacker, &info, &batch, &mut late).await;
        node.unpackers.give_back(unpacker);
        opened?
    };
    late.refuse()?;
    let batch = match rules.codec.filter(|(codec, _)| *codec != info.compression()) {
        Some(to) => repack(info.compression(), batch, to, unpacked, rules).await?,
        None => batch,
    };
    let (times, batch) = if rules.append_time {
        (Times { min: now, max: now }, kafka_batch::with_append_time(&batch, now))
    } else {
        (times, kafka_batch::with_max_timestamp(batch, times.max)?)
    };
    let info = kafka_batch::header(&batch)?;
    Ok((info.with_times(times), batch))
}

fn check_header(info: &BatchInfo, batch: &Bytes, rules: &Rules) -> Result<(), Failure> {
    check_size(batch.len(), rules)?;
    if kafka_batch::base_offset(batch)? != 0 {
        return Err(Failure::from(BatchError::Invalid {
            reason: "the base offset of a batch that is produced must be 0",
        }));
    }
    if info.is_transactional() {
        return Err(Failure::new(
            ResponseError::InvalidRequest,
            "transactional batches are not supported by Millrace yet",
        ));
    }
    if info.is_control() {
        return Err(Failure::from(BatchError::Invalid {
            reason: "clients may not write control batches",
        }));
    }
    if info.is_log_append_time() {
        return Err(Failure::new(
            ResponseError::InvalidTimestamp,
            "a producer may not set the timestamp type LogAppendTime",
        ));
    }
    Ok(())
}

fn check_size(len: usize, rules: &Rules) -> Result<(), Failure> {
    if len <= rules.max_bytes {
        return Ok(());
    }
    Err(Failure::new(
        ResponseError::MessageTooLarge,
        format!("a batch of {len} bytes is over max.message.bytes ({})", rules.max_bytes),
    ))
}

/// Records whose times the topic does not allow.
struct OutOfRange<'a> {
    rules: &'a Rules,
    now: i64,
    named: Vec<(i32, i64)>,
}

impl OutOfRange<'_> {
    fn is_out(&self, timestamp: i64) -> bool {
        let rules = self.rules;
        timestamp != NO_TIMESTAMP
            && (self.now.saturating_sub(timestamp) > rules.before_max_ms
                || timestamp.saturating_sub(self.now) > rules.after_max_ms)
    }

    /// Whether the first or the last of these times is, as it is if any is.
    fn is_among(&self, times: Times) -> bool {
        !self.rules.append_time && ((times.min != i64::MAX && self.is_out(times.min)) || self.is_out(times.max))
    }

    fn note(&mut self, index: i32, timestamp: i64) {
        if self.named.len() < NAMED_MAX && !self.rules.append_time && self.is_out(timestamp) {
            self.named.push((index, timestamp));
        }
    }

    fn refuse(self) -> Result<(), Refused> {
        if self.named.is_empty() {
            return Ok(());
        }
        let now = self.now;
        let of_one = |time: i64| format!("timestamp {time} is outside the range that the topic allows around {now}");
        Err(Refused {
            failure: Failure::new(
                ResponseError::InvalidTimestamp,
                "One or more records have been rejected due to invalid timestamp",
            ),
            records: (self.named.into_iter())
                .map(|(index, time)| (index, of_one(time)))
                .collect(),
        })
    }
}

fn unpack_failure(error: CompressionError) -> Failure {
    match error {
        // As Kafka 4.4: no client sends it again, as it would after CORRUPT_MESSAGE.
        CompressionError::TooLarge { .. } => Failure::new(ResponseError::InvalidRecord, error.to_string()),
        CompressionError::Codec { .. } => Failure::from(BatchError::Decompress {
            reason: error.to_string(),
        }),
    }
}

/// Looks through the records of a compressed batch. Returns their times, and how many bytes they are.
async fn open(
    node: &Rc<Node>,
    unpacker: &mut Unpacker,
    info: &BatchInfo,
    batch: &Bytes,
    late: &mut OutOfRange<'_>,
) -> Result<(Times, usize), Refused> {
    let packed = &batch[BATCH_HEADER_LEN..];
    let mut pieces = unpacker
        .begin(info.compression(), packed, late.rules.unpack_max)
        .map_err(unpack_failure)?;
    let mut walk = RecordWalk::new(info);
    let (mut bytes, mut turn) = (0, 0);
    while let Some(piece) = pieces.next_piece().map_err(unpack_failure)? {
        bytes += piece.len();
        turn += piece.len();
        walk.push(piece, &mut |index, timestamp| late.note(index, timestamp))
            .map_err(|error| Refused {
                records: vec![(walk.records(), error.to_string())],
                failure: error.into(),
            })?;
        if turn >= TURN {
            turn = 0;
            node.host.yield_now().await;
        }
    }
    Ok((walk.finish()?, bytes))
}

/// Packs the records of a batch with the topic's codec.
async fn repack(
    from: i16,
    batch: Bytes,
    (to, level): (i16, Level),
    unpacked: usize,
    rules: &Rules,
) -> Result<Bytes, Refused> {
    let unpack_max = rules.unpack_max;
    let records = batch.slice(BATCH_HEADER_LEN..);
    let work = move || {
        let plain = match from {
            0 => records,
            codec => compression::decompress(codec, &records, unpack_max)?,
        };
        compression::compress(to, level, &plain)
    };
    let packed = if unpacked > REPACKED_HERE {
        glommio::executor().spawn_blocking(work).await
    } else {
        work()
    };
    let packed = packed.map_err(unpack_failure)?;
    check_size(BATCH_HEADER_LEN + packed.len(), rules)?;
    Ok(kafka_batch::with_records(&batch, to, &packed)?)
}
