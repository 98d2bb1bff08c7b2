//! The little of the Kafka protocol that a load needs: blocking sockets, one request at a time or pipelined by the caller.

use std::{
    collections::BTreeMap,
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    sync::OnceLock,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::Outcome;

use bytes::{BufMut, Bytes, BytesMut};
use kafka_protocol::{
    compression::{Compressor, Lz4, Zstd},
    messages::{
        ApiKey, BrokerId, CreateTopicsRequest, CreateTopicsResponse, DeleteTopicsRequest, DeleteTopicsResponse,
        FetchRequest, FetchResponse, MetadataRequest, MetadataResponse, ProduceRequest, RequestHeader, TopicName,
        create_topics_request::{CreatableTopic, CreatableTopicConfig},
        fetch_request::{FetchPartition, FetchTopic},
        metadata_request::MetadataRequestTopic,
        produce_request::{PartitionProduceData, TopicProduceData},
    },
    protocol::{Decodable, Encodable, StrBytes},
};
use serde::{Deserialize, Serialize};

/// Produce version: the last without flexible fields.
pub const PRODUCE: i16 = 7;
/// Fetch version: the last without flexible fields.
pub const FETCH: i16 = 11;
/// Bytes of a batch's header.
pub const BATCH_HEADER: usize = 61;
/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// Most bytes of an answer; more is not one.
const ANSWER_MAX: usize = 256 << 20;

/// Nanoseconds on a clock that all threads of this process share.
pub fn now_ns() -> u64 {
    static BEGIN: OnceLock<Instant> = OnceLock::new();
    BEGIN.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// A connection.
pub fn connect(address: &str) -> Outcome<TcpStream> {
    let stream = TcpStream::connect(address).map_err(|e| format!("{address}: {e}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// A request, ready to be sent.
pub fn request<R: Encodable>(api: ApiKey, version: i16, body: &R) -> Outcome<Bytes> {
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

/// Reads one answer without its length; it begins with the correlation id.
pub fn answer(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Outcome<()> {
    let mut length = [0; 4];
    read(stream, &mut length)?;
    let length = u32::from_be_bytes(length) as usize;
    if length > ANSWER_MAX {
        return Err(format!("an answer claims {length} bytes").into());
    }
    buffer.resize(length, 0);
    read(stream, buffer)
}

fn read(stream: &mut TcpStream, into: &mut [u8]) -> Outcome<()> {
    stream
        .read_exact(into)
        .map_err(|e| match (e.kind(), stream.peer_addr()) {
            // Linux's word for a timeout.
            (ErrorKind::WouldBlock, Ok(peer)) => {
                format!("{peer} did not answer within {} s", PATIENCE.as_secs()).into()
            }
            _ => e.into(),
        })
}

/// Sends and waits. Versions without flexible fields only.
pub fn call<Q: Encodable, A: Decodable>(stream: &mut TcpStream, api: ApiKey, version: i16, body: &Q) -> Outcome<A> {
    stream.write_all(&request(api, version, body)?)?;
    let mut buffer = Vec::new();
    answer(stream, &mut buffer)?;
    if buffer.len() < 4 {
        return Err("an answer is too short".into());
    }
    let mut body = Bytes::from(buffer).slice(4..);
    A::decode(&mut body, version).map_err(Into::into)
}

/// A topic's name on the wire.
pub fn topic_name(name: &str) -> TopicName {
    TopicName(StrBytes::from_string(name.to_owned()))
}

/// Makes a topic and waits until every partition has a leader.
pub fn create_topic(
    address: &str,
    name: &str,
    partitions: i32,
    replicas: i16,
    configs: &[(String, String)],
) -> Outcome<()> {
    let mut stream = connect(address)?;
    let configs = configs
        .iter()
        .map(|(key, value)| {
            CreatableTopicConfig::default()
                .with_name(StrBytes::from_string(key.clone()))
                .with_value(Some(StrBytes::from_string(value.clone())))
        })
        .collect();
    let topic = CreatableTopic::default()
        .with_name(topic_name(name))
        .with_num_partitions(partitions)
        .with_replication_factor(replicas)
        .with_configs(configs);
    let wanted = CreateTopicsRequest::default()
        .with_topics(vec![topic])
        .with_timeout_ms(60_000);
    let made: CreateTopicsResponse = call(&mut stream, ApiKey::CreateTopics, 4, &wanted)?;
    if let Some(failed) = made.topics.iter().find(|t| t.error_code != 0) {
        let message = failed.error_message.as_ref().map_or("", |m| m.as_str());
        return Err(format!("topic {name} cannot be made: error {} {message}", failed.error_code).into());
    }
    let ask = MetadataRequest::default()
        .with_topics(Some(vec![
            MetadataRequestTopic::default().with_name(Some(topic_name(name))),
        ]))
        .with_allow_auto_topic_creation(false);
    for _ in 0..300 {
        let metadata: MetadataResponse = call(&mut stream, ApiKey::Metadata, 5, &ask)?;
        let ready = metadata
            .topics
            .iter()
            .flat_map(|t| &t.partitions)
            .filter(|p| p.error_code == 0 && p.leader_id != BrokerId(-1))
            .count();
        if ready == partitions as usize && serves(address, name)? {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Err(format!("topic {name} has partitions without a leader").into())
}

/// The brokers that lead a topic's partitions, each with those it leads.
pub fn leaders(address: &str, name: &TopicName) -> Outcome<Vec<(String, Vec<i32>)>> {
    let ask = MetadataRequest::default()
        .with_topics(Some(vec![
            MetadataRequestTopic::default().with_name(Some(name.clone())),
        ]))
        .with_allow_auto_topic_creation(false);
    let metadata: MetadataResponse = call(&mut connect(address)?, ApiKey::Metadata, 5, &ask)?;
    let mut leaders = BTreeMap::<BrokerId, Vec<i32>>::new();
    for partition in metadata.topics.iter().flat_map(|t| &t.partitions) {
        leaders
            .entry(partition.leader_id)
            .or_default()
            .push(partition.partition_index);
    }
    let address_of = |id: BrokerId| {
        let broker = metadata.brokers.iter().find(|b| b.node_id == id);
        // A stand-in that names no brokers is where it was found.
        broker.map_or(address.to_owned(), |b| format!("{}:{}", b.host, b.port))
    };
    Ok(leaders
        .into_iter()
        .map(|(id, partitions)| (address_of(id), partitions))
        .collect())
}

/// Whether every partition answers: a leader in the metadata may not know yet that it is one.
fn serves(address: &str, name: &str) -> Outcome<bool> {
    for (leader, partitions) in leaders(address, &topic_name(name))? {
        let offsets: Vec<(i32, i64)> = partitions.iter().map(|p| (*p, 0)).collect();
        let mut stream = connect(&leader)?;
        stream.write_all(&fetch(&topic_name(name), &offsets, 0)?)?;
        let mut buffer = Vec::new();
        answer(&mut stream, &mut buffer)?;
        let response = FetchResponse::decode(&mut Bytes::from(buffer).slice(4..), FETCH)?;
        if response
            .responses
            .iter()
            .flat_map(|t| &t.partitions)
            .any(|p| p.error_code != 0)
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Deletes a topic, so that its bytes do not stay behind.
pub fn delete_topic(address: &str, name: &str) -> Outcome<()> {
    let mut stream = connect(address)?;
    let wanted = DeleteTopicsRequest::default()
        .with_topic_names(vec![topic_name(name)])
        .with_timeout_ms(60_000);
    let _: DeleteTopicsResponse = call(&mut stream, ApiKey::DeleteTopics, 3, &wanted)?;
    Ok(())
}

/// A Produce request of one topic.
pub fn produce(topic: &TopicName, acks: i16, batches: Vec<(i32, Bytes)>) -> Outcome<Bytes> {
    let data = batches
        .into_iter()
        .map(|(partition, batch)| {
            PartitionProduceData::default()
                .with_index(partition)
                .with_records(Some(batch))
        })
        .collect();
    let topic = TopicProduceData::default()
        .with_name(topic.clone())
        .with_partition_data(data);
    let body = ProduceRequest::default()
        .with_acks(acks)
        .with_timeout_ms(30_000)
        .with_topic_data(vec![topic]);
    request(ApiKey::Produce, PRODUCE, &body)
}

/// A Fetch request of one topic that waits so many milliseconds for anything.
pub fn fetch(topic: &TopicName, offsets: &[(i32, i64)], wait_ms: i32) -> Outcome<Bytes> {
    let partitions = offsets
        .iter()
        .map(|(partition, offset)| {
            FetchPartition::default()
                .with_partition(*partition)
                .with_current_leader_epoch(-1)
                .with_fetch_offset(*offset)
                .with_log_start_offset(-1)
                .with_partition_max_bytes(1 << 20)
        })
        .collect();
    let topic = FetchTopic::default()
        .with_topic(topic.clone())
        .with_partitions(partitions);
    let body = FetchRequest::default()
        .with_replica_id(BrokerId(-1))
        .with_max_wait_ms(wait_ms)
        .with_min_bytes(1)
        .with_max_bytes(32 << 20)
        .with_session_id(0)
        .with_session_epoch(-1)
        .with_topics(vec![topic]);
    request(ApiKey::Fetch, FETCH, &body)
}

fn put_varint(out: &mut BytesMut, value: i64) {
    let mut n = ((value << 1) ^ (value >> 63)) as u64;
    while n >= 0x80 {
        out.put_u8(n as u8 | 0x80);
        n >>= 7;
    }
    out.put_u8(n as u8);
}

fn varint_len(value: i64) -> usize {
    let n = ((value << 1) ^ (value >> 63)) as u64;
    (64 - (n | 1).leading_zeros() as usize).div_ceil(7)
}

fn varint(bytes: &mut &[u8]) -> Option<i64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some((value >> 1) as i64 ^ -((value & 1) as i64));
        }
    }
    None
}

/// How a batch's records are packed.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Codec {
    /// Not at all.
    #[default]
    None,
    /// LZ4.
    Lz4,
    /// Zstandard.
    Zstd,
}

/// Packs records in place.
fn pack(records: &mut BytesMut, codec: Codec) -> Outcome<()> {
    let mut packed = BytesMut::new();
    let put = |out: &mut BytesMut| {
        out.extend_from_slice(records);
        Ok(())
    };
    match codec {
        Codec::None => return Ok(()),
        Codec::Lz4 => Lz4::compress(&mut packed, put)?,
        Codec::Zstd => Zstd::compress(&mut packed, put)?,
    }
    *records = packed;
    Ok(())
}

/// A record batch: a record for each of `times`, which its value of `size` bytes begins with; the rest is `filler`.
///
/// # Errors
/// The codec's.
pub fn batch(times: &[u64], size: usize, filler: &[u8], codec: Codec) -> Outcome<Bytes> {
    let mut out = BytesMut::with_capacity(BATCH_HEADER + times.len() * (size + 20));
    out.put_i64(0);
    out.put_i32(0);
    out.put_i32(-1);
    out.put_i8(2);
    out.put_u32(0);
    let checked_from = out.len();
    // The codecs' numbers in a batch's attributes.
    out.put_i16(match codec {
        Codec::None => 0,
        Codec::Lz4 => 3,
        Codec::Zstd => 4,
    });
    out.put_i32(times.len() as i32 - 1);
    // Records of 1970 would be deleted by retention.
    let wall = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as i64);
    out.put_i64(wall);
    out.put_i64(wall);
    out.put_i64(-1);
    out.put_i16(-1);
    out.put_i32(-1);
    out.put_i32(times.len() as i32);
    let mut records = out.split_off(BATCH_HEADER);
    for (n, time) in times.iter().enumerate() {
        let delta = n as i64;
        // attributes, timestamp delta, offset delta, no key, value, no headers
        let len = 1 + 1 + varint_len(delta) + 1 + varint_len(size as i64) + size + 1;
        put_varint(&mut records, len as i64);
        records.put_u8(0);
        put_varint(&mut records, 0);
        put_varint(&mut records, delta);
        put_varint(&mut records, -1);
        put_varint(&mut records, size as i64);
        records.put_u64(*time);
        records.put_slice(&filler[..size - 8]);
        put_varint(&mut records, 0);
    }
    pack(&mut records, codec)?;
    out.unsplit(records);
    let length = out.len() as i32 - 12;
    out[8..12].copy_from_slice(&length.to_be_bytes());
    let crc = crc32c::crc32c(&out[checked_from..]);
    out[17..21].copy_from_slice(&crc.to_be_bytes());
    Ok(out.freeze())
}

/// The offset behind the last whole batch of fetched bytes.
pub fn next_offset(mut bytes: &[u8]) -> Option<i64> {
    let mut next = None;
    while bytes.len() >= BATCH_HEADER {
        let length = 12 + u32::from_be_bytes(*bytes[8..].first_chunk()?) as usize;
        let base = i64::from_be_bytes(*bytes.first_chunk()?);
        let last_delta = i32::from_be_bytes(*bytes[23..].first_chunk()?);
        let Some(rest) = bytes.get(length..) else { break };
        next = Some(base + i64::from(last_delta) + 1);
        bytes = rest;
    }
    next
}

/// Shows the time that each record of fetched batches begins with; returns the offset behind the last whole batch.
pub fn for_each_time(mut bytes: &[u8], mut see: impl FnMut(u64)) -> Option<i64> {
    let mut next = None;
    while bytes.len() >= BATCH_HEADER {
        let length = 12 + u32::from_be_bytes(*bytes[8..].first_chunk()?) as usize;
        if bytes.len() < length {
            break;
        }
        let base = i64::from_be_bytes(*bytes.first_chunk()?);
        let last_delta = i32::from_be_bytes(*bytes[23..].first_chunk()?);
        let count = u32::from_be_bytes(*bytes[57..].first_chunk()?);
        let mut records = &bytes[BATCH_HEADER..length];
        for _ in 0..count {
            let len = varint(&mut records)? as usize;
            let (mut record, rest) = records.split_at_checked(len)?;
            records = rest;
            record = record.get(1..)?;
            let (_, _) = (varint(&mut record)?, varint(&mut record)?);
            let key = varint(&mut record)?;
            record = record.get(usize::try_from(key).unwrap_or(0)..)?;
            let _ = varint(&mut record)?;
            see(u64::from_be_bytes(*record.first_chunk()?));
        }
        next = Some(base + i64::from(last_delta) + 1);
        bytes = &bytes[length..];
    }
    next
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_batch_holds_is_found_again() {
        for size in [8, 100, 1000] {
            let times: Vec<u64> = (0..300).map(|n| n * 1_000_003).collect();
            let mut bytes = batch(&times, size, &[b'x'; 1000], Codec::None).expect("packs").to_vec();
            // Behind another batch, and cut inside a third.
            bytes[..8].copy_from_slice(&40_i64.to_be_bytes());
            let cut = batch(&times, size, &[b'x'; 1000], Codec::None).expect("packs");
            bytes.extend_from_slice(&cut[..cut.len() - 1]);
            let mut seen = Vec::new();
            assert_eq!(next_offset(&bytes), Some(340));
            assert_eq!(for_each_time(&bytes, |t| seen.push(t)), Some(340));
            assert_eq!(seen, times);
        }
    }
}
