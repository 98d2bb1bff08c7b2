//! The least that a server which flushes before it acknowledges can do, for the same client over the same protocol: one
//! thread a connection takes what has come in, writes it with one durable direct write into a prewritten file of its own,
//! and answers. No log, no index, no other core to ask, nothing to read again: what a broker needs beyond this is its own.
//! Topics with a `flush.messages` above 1 are written without a flush.

use std::{
    fs::{OpenOptions, create_dir_all},
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering},
    thread,
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use kafka_protocol::{
    messages::{
        ApiKey, BrokerId, CreateTopicsRequest, CreateTopicsResponse, DeleteTopicsResponse, FetchResponse,
        MetadataRequest, MetadataResponse, ProduceRequest, ProduceResponse, RequestHeader,
        metadata_response::{MetadataResponsePartition, MetadataResponseTopic},
        produce_response::{PartitionProduceResponse, TopicProduceResponse},
    },
    protocol::{Decodable, Encodable},
};

use crate::{
    Outcome,
    floor::{O_DIRECT, Prewritten},
};

/// Bytes read from a socket at once, and most that a group takes.
const READ: usize = 1 << 20;

/// Partitions of the topic made last: the client asks for them in metadata.
static PARTITIONS: AtomicI32 = AtomicI32::new(1);
/// Whether it is to be flushed.
static FLUSHES: AtomicBool = AtomicBool::new(true);
static FILES: AtomicU64 = AtomicU64::new(0);

/// Serves until the process is ended. The port is printed.
///
/// # Errors
/// No port, or no folder.
pub fn run(dir: &Path) -> Outcome<()> {
    create_dir_all(dir)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("ready on {}", listener.local_addr()?);
    for stream in listener.incoming() {
        let (stream, dir) = (stream?, dir.to_owned());
        thread::spawn(move || {
            if let Err(error) = serve(stream, &dir) {
                eprintln!("connection ended: {error}");
            }
        });
    }
    Ok(())
}

fn serve(mut stream: TcpStream, dir: &Path) -> Outcome<()> {
    stream.set_nodelay(true)?;
    let path = dir.join(FILES.fetch_add(1, Ordering::Relaxed).to_string());
    let mut file = None;
    let mut piece = vec![0; READ];
    let mut unread = BytesMut::with_capacity(READ);
    let (mut payloads, mut answers) = (Vec::new(), BytesMut::new());
    loop {
        let mut frames = 0;
        while let Some(frame) = next_frame(&mut unread) {
            frames += 1;
            answer(frame, &mut payloads, &mut answers)?;
            if payloads.len() >= READ {
                break;
            }
        }
        if !payloads.is_empty() {
            let file = match &mut file {
                Some(file) => file,
                none => none.insert(Prewritten::new(
                    OpenOptions::new()
                        .read(true)
                        .write(true)
                        .create_new(true)
                        .custom_flags(O_DIRECT)
                        .open(&path)?,
                )?),
            };
            file.append(&payloads, FLUSHES.load(Ordering::Relaxed))?;
            payloads.clear();
        }
        if !answers.is_empty() {
            stream.write_all(&answers)?;
            answers.clear();
        }
        if frames == 0 {
            let read = stream.read(&mut piece)?;
            if read == 0 {
                return Ok(());
            }
            unread.extend_from_slice(&piece[..read]);
        }
    }
}

fn next_frame(unread: &mut BytesMut) -> Option<Bytes> {
    let length = u32::from_be_bytes(*unread.first_chunk()?) as usize;
    if unread.len() < 4 + length {
        return None;
    }
    unread.advance(4);
    Some(unread.split_to(length).freeze())
}

fn answer(mut frame: Bytes, payloads: &mut Vec<u8>, out: &mut BytesMut) -> Outcome<()> {
    let header = RequestHeader::decode(&mut frame, 1)?;
    let version = header.request_api_version;
    let start = out.len();
    out.put_i32(0);
    out.put_i32(header.correlation_id);
    match ApiKey::try_from(header.request_api_key).map_err(|()| "an unknown API")? {
        ApiKey::Produce => {
            let request = ProduceRequest::decode(&mut frame, version)?;
            let mut topics = Vec::with_capacity(request.topic_data.len());
            for topic in request.topic_data {
                let mut partitions = Vec::with_capacity(topic.partition_data.len());
                for data in topic.partition_data {
                    payloads.extend_from_slice(&data.records.unwrap_or_default());
                    partitions.push(PartitionProduceResponse::default().with_index(data.index));
                }
                topics.push(
                    TopicProduceResponse::default()
                        .with_name(topic.name)
                        .with_partition_responses(partitions),
                );
            }
            ProduceResponse::default().with_responses(topics).encode(out, version)?;
        }
        ApiKey::Fetch => FetchResponse::default().encode(out, version)?,
        ApiKey::Metadata => {
            let request = MetadataRequest::decode(&mut frame, version)?;
            let partitions: Vec<_> = (0..PARTITIONS.load(Ordering::Relaxed))
                .map(|index| {
                    MetadataResponsePartition::default()
                        .with_partition_index(index)
                        .with_leader_id(BrokerId(0))
                })
                .collect();
            let topics = request.topics.unwrap_or_default().into_iter().map(|t| {
                MetadataResponseTopic::default()
                    .with_name(t.name)
                    .with_partitions(partitions.clone())
            });
            MetadataResponse::default()
                .with_topics(topics.collect())
                .encode(out, version)?;
        }
        ApiKey::CreateTopics => {
            let request = CreateTopicsRequest::decode(&mut frame, version)?;
            let topic = request.topics.first();
            let flush = topic.and_then(|t| t.configs.iter().find(|c| *c.name == *"flush.messages"));
            let relaxed = flush.is_some_and(|c| c.value.as_deref().is_some_and(|v| v != "1"));
            FLUSHES.store(!relaxed, Ordering::Relaxed);
            PARTITIONS.store(topic.map_or(1, |t| t.num_partitions), Ordering::Relaxed);
            CreateTopicsResponse::default().encode(out, version)?;
        }
        ApiKey::DeleteTopics => DeleteTopicsResponse::default().encode(out, version)?,
        other => return Err(format!("the floor does not answer {other:?}").into()),
    }
    let length = (out.len() - start - 4) as u32;
    out[start..start + 4].copy_from_slice(&length.to_be_bytes());
    Ok(())
}
