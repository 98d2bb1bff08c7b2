//! Open-loop produce: one thread sends on schedule, one receives; they share a queue of intended times.

use std::{
    error::Error,
    io::{Read, Write},
    net::TcpStream,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use bytes::{BufMut, Bytes, BytesMut};
use clap::Args;
use hdrhistogram::Histogram;
use kafka_protocol::{
    messages::{
        ApiKey, MetadataRequest, ProduceRequest, RequestHeader, TopicName,
        metadata_request::MetadataRequestTopic,
        produce_request::{PartitionProduceData, TopicProduceData},
    },
    protocol::{Encodable, StrBytes},
};

use crate::summary;

/// What is sent.
#[derive(Args, Clone)]
pub struct Load {
    /// Broker.
    #[arg(long, default_value = "127.0.0.1:9092")]
    target: String,
    /// Topic; made with the broker's defaults if it is not there.
    #[arg(long, default_value = "bench")]
    topic: String,
    /// Partitions to spread over; the topic must have them.
    #[arg(long, default_value_t = 1)]
    partitions: i32,
    /// Records per second.
    #[arg(long, default_value_t = 5000)]
    rate: u64,
    /// Bytes of a record's value.
    #[arg(long, default_value_t = 1000)]
    size: usize,
    /// Seconds measured, after a tenth as much warm-up.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// -1 all, 1 leader.
    #[arg(long, default_value_t = -1, allow_negative_numbers = true)]
    acks: i16,
    /// Connections, each with a schedule of its own.
    #[arg(long, default_value_t = 1)]
    connections: u64,
}

const PRODUCE_VERSION: i16 = 7;

fn request<R: Encodable>(api: ApiKey, version: i16, body: &R) -> Result<Bytes, Box<dyn Error>> {
    let mut out = BytesMut::new();
    out.put_i32(0);
    RequestHeader::default()
        .with_request_api_key(api as i16)
        .with_request_api_version(version)
        .with_client_id(Some(StrBytes::from_static_str("millrace-bench")))
        .encode(&mut out, api.request_header_version(version))?;
    body.encode(&mut out, version)?;
    let length = (out.len() - 4) as i32;
    out[..4].copy_from_slice(&length.to_be_bytes());
    Ok(out.freeze())
}

fn put_varint(out: &mut Vec<u8>, value: i64) {
    let mut n = ((value << 1) ^ (value >> 63)) as u64;
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

/// One record in a batch of its own.
fn batch(size: usize) -> Bytes {
    let mut record = vec![0, 0, 0, 1];
    put_varint(&mut record, size as i64);
    record.resize(record.len() + size, b'x');
    record.push(0);
    let mut body = BytesMut::new();
    body.put_i16(0);
    body.put_i32(0);
    body.put_i64(0);
    body.put_i64(0);
    body.put_i64(-1);
    body.put_i16(-1);
    body.put_i32(-1);
    body.put_i32(1);
    let mut length = Vec::new();
    put_varint(&mut length, record.len() as i64);
    body.put_slice(&length);
    body.put_slice(&record);
    let mut out = BytesMut::new();
    out.put_i64(0);
    out.put_i32(body.len() as i32 + 9);
    out.put_i32(-1);
    out.put_i8(2);
    out.put_u32(crc32c::crc32c(&body));
    out.put_slice(&body);
    out.freeze()
}

fn read_answer(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> std::io::Result<()> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    buffer.resize(u32::from_be_bytes(length) as usize, 0);
    stream.read_exact(buffer)
}

/// Runs the load and prints the result.
pub fn run(load: &Load) -> Result<(), Box<dyn Error>> {
    ensure_topic(load)?;
    let threads: Vec<_> = (0..load.connections)
        .map(|_| {
            let load = load.clone();
            thread::spawn(move || one_connection(&load).map_err(|e| e.to_string()))
        })
        .collect();
    let mut all = Histogram::<u64>::new(3)?;
    let mut late = Duration::ZERO;
    for thread in threads {
        let (histogram, behind) = thread.join().map_err(|_| "a connection's thread panicked")??;
        all.add(histogram)?;
        late = late.max(behind);
    }
    let name = format!("{} records/s of {} B, acks {}", load.rate, load.size, load.acks);
    println!("{}", summary(&name, &all));
    // Half the p99 of a slow target would be invisible; this is about the generator alone.
    if late > Duration::from_millis(5) {
        println!("invalid: the generator was up to {late:?} behind its schedule");
    }
    Ok(())
}

fn ensure_topic(load: &Load) -> Result<(), Box<dyn Error>> {
    let mut stream = TcpStream::connect(&load.target)?;
    let name = TopicName(StrBytes::from_string(load.topic.clone()));
    let wanted = MetadataRequest::default()
        .with_topics(Some(vec![MetadataRequestTopic::default().with_name(Some(name))]))
        .with_allow_auto_topic_creation(true);
    // The second answer comes when the first has made the topic.
    for _ in 0..2 {
        stream.write_all(&request(ApiKey::Metadata, 4, &wanted)?)?;
        read_answer(&mut stream, &mut Vec::new())?;
        thread::sleep(Duration::from_millis(300));
    }
    Ok(())
}

fn one_connection(load: &Load) -> Result<(Histogram<u64>, Duration), Box<dyn Error>> {
    let mut sender = TcpStream::connect(&load.target)?;
    sender.set_nodelay(true)?;
    let mut receiver = sender.try_clone()?;
    let requests: Vec<Bytes> = (0..load.partitions)
        .map(|partition| {
            let data = PartitionProduceData::default()
                .with_index(partition)
                .with_records(Some(batch(load.size)));
            let topic = TopicProduceData::default()
                .with_name(TopicName(StrBytes::from_string(load.topic.clone())))
                .with_partition_data(vec![data]);
            let body = ProduceRequest::default()
                .with_acks(load.acks)
                .with_timeout_ms(30_000)
                .with_topic_data(vec![topic]);
            request(ApiKey::Produce, PRODUCE_VERSION, &body)
        })
        .collect::<Result<_, _>>()?;
    // The error code: correlation id, one topic's name, one partition's index come before it.
    let error_at = 4 + 4 + 2 + load.topic.len() + 4 + 4;
    let (intended_tx, intended_rx) = mpsc::channel::<Instant>();
    let warm_up = Duration::from_secs(load.seconds) / 10;
    let begin = Instant::now() + Duration::from_millis(50);
    let receive = thread::spawn(move || -> Result<Histogram<u64>, String> {
        let mut histogram = Histogram::<u64>::new(3).map_err(|e| e.to_string())?;
        let mut buffer = Vec::new();
        while let Ok(intended) = intended_rx.recv() {
            read_answer(&mut receiver, &mut buffer).map_err(|e| e.to_string())?;
            let latency = intended.elapsed();
            let code = buffer.get(error_at..error_at + 2).ok_or("an answer is too short")?;
            if code != [0, 0] {
                return Err(format!(
                    "the broker answered with error {}",
                    i16::from_be_bytes([code[0], code[1]])
                ));
            }
            if intended >= begin + warm_up {
                histogram.record(latency.as_nanos() as u64).map_err(|e| e.to_string())?;
            }
        }
        Ok(histogram)
    });
    let step = Duration::from_secs_f64(load.connections as f64 / load.rate as f64);
    let total = ((load.seconds as f64 * 1.1) / step.as_secs_f64()) as u32;
    let mut late = Duration::ZERO;
    // The kernel may otherwise wake a sleeper 50 us late to save wake-ups.
    let _ = std::fs::write("/proc/thread-self/timerslack_ns", "1000");
    for n in 0..total {
        let intended = begin + step * n;
        // Slept, not spun: a spinning generator takes from a small machine what it wants to measure.
        let left = intended.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            thread::sleep(left);
        }
        late = late.max(intended.elapsed());
        intended_tx.send(intended)?;
        sender.write_all(&requests[n as usize % requests.len()])?;
    }
    drop(intended_tx);
    let histogram = receive.join().map_err(|_| "the receiving thread panicked")??;
    Ok((histogram, late))
}
