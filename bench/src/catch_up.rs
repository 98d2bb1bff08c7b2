//! Readers of a backlog: a topic is filled before the measured time, and connections read it from its first record while
//! producers go on. What the operating system has cached is dropped first, if this program may (`root`); what a broker has
//! cached itself stays.

use std::{
    io::Write,
    net::TcpStream,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use bytes::Bytes;
use kafka_protocol::{
    messages::{FetchResponse, ProduceResponse, TopicName},
    protocol::Decodable,
};

use crate::{
    Outcome,
    wire::{self, Codec, now_ns},
};

/// Bytes of a batch of the backlog, and of its records.
const BATCH: usize = 128 << 10;
const RECORD: usize = 1000;
/// Requests in flight while filling.
const IN_FLIGHT: usize = 5;

/// Fills the partitions that a broker leads with so many bytes together; returns records written to each.
///
/// # Errors
/// The broker refuses.
pub fn fill(address: &str, topic: &TopicName, partitions: &[i32], bytes: u64) -> Outcome<i64> {
    let mut stream = wire::connect(address)?;
    let per_batch = BATCH / RECORD;
    let batch = wire::batch(&vec![0; per_batch], RECORD, &vec![b'x'; RECORD], Codec::None)?;
    let requests: Vec<Bytes> = partitions
        .iter()
        .map(|p| wire::produce(topic, -1, vec![(*p, batch.clone())]))
        .collect::<Outcome<_>>()?;
    let rounds = bytes.div_ceil((batch.len() * partitions.len()) as u64);
    let total = rounds as usize * partitions.len();
    for n in 0..total + IN_FLIGHT {
        if n < total {
            stream.write_all(&requests[n % requests.len()])?;
        }
        if n >= IN_FLIGHT {
            acknowledged(&mut stream)?;
        }
    }
    Ok(rounds as i64 * per_batch as i64)
}

fn acknowledged(stream: &mut TcpStream) -> Outcome<()> {
    let mut buffer = Vec::new();
    wire::answer(stream, &mut buffer)?;
    let response = ProduceResponse::decode(&mut Bytes::from(buffer).slice(4..), wire::PRODUCE)?;
    let codes = response.responses.iter().flat_map(|t| &t.partition_responses);
    match codes.map(|p| p.error_code).find(|code| *code != 0) {
        Some(code) => Err(format!("the broker refused the backlog with error {code}").into()),
        None => Ok(()),
    }
}

/// Drops clean pages of files from memory, for whoever reads through the operating system's cache.
pub fn drop_caches() {
    let _ = Command::new("sync").status();
    let _ = std::fs::write("/proc/sys/vm/drop_caches", "1");
}

/// What a reader read.
#[derive(Clone, Copy, Default, Debug)]
pub struct Read {
    /// Bytes of record batches.
    pub bytes: u64,
    /// Nanoseconds it took.
    pub nanoseconds: u64,
}

/// Reads the backlog of some partitions, `records` in each, until it has all or is told to stop.
///
/// # Errors
/// The broker refuses.
pub fn read(
    address: &str,
    topic: &TopicName,
    partitions: &[i32],
    records: i64,
    begin: u64,
    stop: &AtomicBool,
) -> Outcome<Read> {
    let mut stream = wire::connect(address)?;
    let mut offsets: Vec<(i32, i64)> = partitions.iter().map(|p| (*p, 0)).collect();
    std::thread::sleep(Duration::from_nanos(begin.saturating_sub(now_ns())));
    let began = now_ns();
    let mut out = Read::default();
    let mut buffer = Vec::new();
    while !offsets.is_empty() && !stop.load(Ordering::Acquire) {
        stream.write_all(&wire::fetch(topic, &offsets, 500)?)?;
        wire::answer(&mut stream, &mut buffer)?;
        let mut body = Bytes::from(std::mem::take(&mut buffer)).slice(4..);
        let response = FetchResponse::decode(&mut body, wire::FETCH)?;
        for partition in response.responses.iter().flat_map(|t| &t.partitions) {
            if partition.error_code != 0 {
                return Err(format!("a reader of the backlog got error {}", partition.error_code).into());
            }
            let Some(bytes) = &partition.records else { continue };
            out.bytes += bytes.len() as u64;
            if let Some(next) = wire::next_offset(bytes)
                && let Some(offset) = offsets.iter_mut().find(|(p, _)| *p == partition.partition_index)
            {
                offset.1 = next;
            }
        }
        offsets.retain(|(_, offset)| *offset < records);
    }
    out.nanoseconds = now_ns() - began;
    Ok(out)
}
