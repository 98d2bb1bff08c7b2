//! Every decoder of bytes from a socket or a disk, fed with anything: it may refuse, but not panic, hang, or take memory
//! that the bytes do not justify. What it takes can be encoded again and means the same; [`answers`] are encoders of what
//! is never decoded here.
//!
//! [`TARGETS`] are run by cargo-fuzz (`tests/fuzz/cargo-fuzz`, see there) for as long as one likes, and by
//! `tests/smoke.rs` for a moment with every test run. What checksums guard is also tried with the checksum put right, or
//! nothing behind it would ever be reached.

pub mod answers;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use kafka_protocol::{
    messages::{
        FetchRequest, JoinGroupRequest, ListOffsetsRequest, MetadataRequest, OffsetCommitRequest, ProduceRequest,
        RequestHeader, TopicName,
        fetch_request::{FetchPartition, FetchTopic},
        produce_request::{PartitionProduceData, TopicProduceData},
    },
    protocol::{Encodable, StrBytes},
};
use millrace_cluster::{
    group::{self, records::GroupRecord},
    metadata, peer, raft, replica,
};
use millrace_engine::{
    BatchError, PartitionKey, agreed,
    batch::{Batch, BatchHeader, HEADER_LEN},
    checkpoint,
    disk::sim::SimHost,
    host::{Host, HostFile, OpenMode},
    index::SegmentIndex,
    journal::{Position, format::GroupHeader, slot_path},
    kafka_batch::{self, BATCH_HEADER_LEN, BatchInfo, NewRecord, Times},
    layout::{BLOCK, FileHeader, FileKind},
    log::EpochCache,
    record_walk::RecordWalk,
    recovery,
    shard::ShardConfig,
};
use millrace_net::{
    kafka::{codec, compression},
    listener::FrameReader,
};
use uuid::Uuid;

/// A decoder under test.
pub struct Target {
    /// Its name, also that of the cargo-fuzz target.
    pub name: &'static str,
    /// Feeds it.
    pub run: fn(&[u8]),
    /// Sound inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target {
        name: "frames",
        run: frames,
        seeds: frame_seeds,
    },
    Target {
        name: "request",
        run: request,
        seeds: request_seeds,
    },
    Target {
        name: "records",
        run: records,
        seeds: record_seeds,
    },
    Target {
        name: "decompress",
        run: decompress,
        seeds: packed_seeds,
    },
    Target {
        name: "batch_header",
        run: batch_header,
        seeds: batch_header_seeds,
    },
    Target {
        name: "journal",
        run: journal,
        seeds: journal_seeds,
    },
    Target {
        name: "checkpoint",
        run: checkpoint_file,
        seeds: checkpoint_seeds,
    },
    Target {
        name: "index",
        run: index_file,
        seeds: index_seeds,
    },
    Target {
        name: "agreed",
        run: agreed_file,
        seeds: agreed_seeds,
    },
    Target {
        name: "metadata",
        run: metadata_record,
        seeds: metadata_seeds,
    },
    Target {
        name: "peer",
        run: peer,
        seeds: peer_seeds,
    },
    Target {
        name: "group_record",
        run: group_record,
        seeds: group_record_seeds,
    },
    Target {
        name: "answers",
        run: answers::run,
        seeds: answers::seeds,
    },
];

/// Runs a target by its name, for cargo-fuzz.
///
/// # Panics
/// There is none of that name, or the decoder failed.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|t| t.name == name).expect("a target of that name");
    (target.run)(data);
}

/// Bytes that anything may unpack to here.
const UNPACKED_MAX: usize = 1 << 20;

fn frames(data: &[u8]) {
    futures_lite::future::block_on(async {
        let mut reader = FrameReader::new(futures_lite::io::Cursor::new(data), 1 << 20);
        while let Ok(Some(length)) = reader.next_length().await {
            match reader.frame(length, async |needed, _| needed).await {
                Ok(frame) => assert_eq!(frame.len(), length),
                Err(_) => return,
            }
        }
    });
}

fn request(data: &[u8]) {
    let _ = codec::check(Bytes::copy_from_slice(data)).and_then(codec::Checked::decode);
}

fn records(data: &[u8]) {
    let unpack = |bytes: &[u8]| {
        let Ok(batches) = kafka_batch::split(Bytes::copy_from_slice(bytes)) else {
            return;
        };
        for (info, batch) in batches {
            let packed = &batch[BATCH_HEADER_LEN..];
            let plain = if info.compression() == 0 {
                Ok(Bytes::copy_from_slice(packed))
            } else {
                compression::decompress(info.compression(), packed, UNPACKED_MAX)
            };
            if let Ok(plain) = plain {
                let whole: Result<(), BatchError> = kafka_batch::for_each_record(&plain, &info, |_| true);
                assert_eq!(walk(&info, &plain).is_ok(), whole.is_ok());
            }
            let header = BatchHeader::for_kafka(KEY, &info, &batch);
            assert_eq!(header.payload_len as usize, batch.len());
        }
    };
    unpack(data);
    if data.len() > BATCH_HEADER_LEN {
        let mut sound = data.to_vec();
        let length = (sound.len() - 12) as u32;
        sound[8..12].copy_from_slice(&length.to_be_bytes());
        sound[16] = 2;
        let crc = crc32c::crc32c(&sound[21..]);
        sound[17..21].copy_from_slice(&crc.to_be_bytes());
        unpack(&sound);
    }
}

/// The records in pieces, as they come out of a decompressor.
fn walk(info: &BatchInfo, plain: &[u8]) -> Result<Times, BatchError> {
    let mut walk = RecordWalk::new(info);
    for piece in plain.chunks(7) {
        walk.push(piece, &mut |_, _| {})?;
    }
    walk.finish()
}

fn decompress(data: &[u8]) {
    let Some((codec, packed)) = data.split_first() else {
        return;
    };
    if let Ok(plain) = compression::decompress(i16::from(codec % 5), packed, UNPACKED_MAX) {
        assert!(plain.len() <= UNPACKED_MAX);
    }
}

fn batch_header(data: &[u8]) {
    if let Some(bytes) = data.first_chunk::<HEADER_LEN>() {
        let _ = BatchHeader::decode(bytes);
    }
    let _ = GroupHeader::decode(data);
    for kind in [
        FileKind::Journal,
        FileKind::Segment,
        FileKind::Index,
        FileKind::Checkpoint,
    ] {
        let _ = FileHeader::decode(data, kind, Path::new("fuzz"));
    }
}

const KEY: PartitionKey = PartitionKey {
    topic: Uuid::from_u128(9),
    partition: 0,
};

fn put(host: &SimHost, path: &Path, bytes: &[u8]) {
    let done = host.run(async {
        let file = host.open(path, OpenMode::Create).await?;
        let mut buffer = host.buffer(bytes.len().next_multiple_of(BLOCK as usize));
        buffer[..bytes.len()].copy_from_slice(bytes);
        file.write_at(buffer, 0).await
    });
    done.expect("nothing cuts the run")
        .expect("a simulated disk without faults");
}

fn shard_config() -> ShardConfig {
    ShardConfig {
        dir: PathBuf::from("/data"),
        shard: 0,
        incarnation: 0,
        journal_slot_bytes: 64 << 10,
        journal_slots: 2,
        direct_bytes_min: 16 << 10,
        room_ahead_min: 8 << 10,
        queue_bytes: 64 << 10,
        tail_bytes: 64 << 10,
        read_cache_bytes: 1 << 20,
        open_files: 4,
        sync_all_min: 8,
        free_bytes_min: 0,
        retention_check: std::time::Duration::from_secs(30),
        producer_expiration_ms: i64::MAX / 2,
        producers_max: 1_000,
    }
}

/// A journal's file behind a block that is sound, as recovery reads it.
fn journal(data: &[u8]) {
    let host = SimHost::new();
    let config = shard_config();
    host.run(checkpoint::store(
        &host,
        &config.checkpoint_dir(),
        checkpoint::Name::Base { incarnation: 1 },
        Position::START,
        0,
        Vec::new(),
    ))
    .expect("nothing cuts the run")
    .expect("a simulated disk without faults");
    let mut file = vec![0; BLOCK as usize];
    FileHeader {
        kind: FileKind::Journal,
        topic: Uuid::nil(),
        number: 0,
        base: 0,
    }
    .encode(&mut file);
    file.extend_from_slice(&data[..data.len().min(60 << 10)]);
    put(&host, &slot_path(&config.journal_dir(), 0, 0), &file);
    let _ = host.run(recovery::recover(&host, &config, 1)).expect("it ends");
}

/// Puts length and checksum of an archive right.
fn sound_archive(kind: FileKind, archive: &[u8]) -> Vec<u8> {
    let mut file = vec![0; BLOCK as usize];
    FileHeader {
        kind,
        topic: Uuid::nil(),
        number: 0,
        base: 1,
    }
    .encode(&mut file);
    file.extend_from_slice(&(archive.len() as u64).to_le_bytes());
    file.extend_from_slice(&crc32c::crc32c(archive).to_le_bytes());
    file.extend_from_slice(&[0; 4]);
    file.extend_from_slice(archive);
    file
}

fn checkpoint_file(data: &[u8]) {
    for file in [data.to_vec(), sound_archive(FileKind::Checkpoint, data)] {
        let host = SimHost::new();
        let config = shard_config();
        put(
            &host,
            &config.checkpoint_dir().join("0000000001-base.checkpoint"),
            &file,
        );
        let _ = host.run(recovery::recover(&host, &config, 1)).expect("it ends");
    }
}

fn index_file(data: &[u8]) {
    for file in [data.to_vec(), sound_archive(FileKind::Index, data)] {
        let host = SimHost::new();
        let path = Path::new("/data/index");
        put(&host, path, &file);
        if let Some(index) = host.run(SegmentIndex::load(&host, path)).expect("it ends") {
            let _ = (index.offset_of_time(1), index.position_of(1));
        }
    }
}

fn agreed_file(data: &[u8]) {
    let mut epochs = EpochCache::default();
    epochs.note(1, 0);
    for file in [data.to_vec(), sound_archive(FileKind::Agreed, data)] {
        let host = SimHost::new();
        let dir = Path::new("/data/agreed");
        put(&host, &dir.join("0000.agreed"), &file);
        let notes = host.run(agreed::load(&host, dir)).expect("it ends");
        for note in notes.expect("a damaged file is left out").values() {
            assert!(note.recall(&epochs, 10).is_none_or(|end| (1..=10).contains(&end)));
        }
    }
}

fn metadata_record(data: &[u8]) {
    let _ = metadata::record::decode::<Vec<metadata::MetadataRecord>>(data);
    if let Ok(proposal) = metadata::record::decode::<metadata::Proposal>(data) {
        let again = metadata::record::decode::<metadata::Proposal>(&metadata::record::encode(&proposal));
        assert_eq!(again.expect("what was read can be written"), proposal);
    }
    let _ = millrace_cluster::raft::records_in(data);
}

/// What other nodes send: frames of replication, first frames, messages of the metadata quorum.
fn peer(data: &[u8]) {
    if let Ok((request, batches)) = replica::message::decode_request(&Bytes::copy_from_slice(data)) {
        let parts = replica::message::encode_request(&request, &batches);
        let again = replica::message::decode_request(&parts.concat().into()).expect("what was read can be written");
        assert_eq!((again.0, again.1.len()), (request, batches.len()));
    }
    let _ = metadata::record::decode::<replica::Answer>(data);
    let _ = metadata::record::decode::<peer::Hello>(data);
    let _ = metadata::record::decode::<peer::HelloAnswer>(data);
    let _ = metadata::record::decode::<peer::Introduction>(data);
    // What a member persisted. Messages of members are not tried: Raft believes those it has let in, and its library panics at
    // lies that are well formed.
    let config = raft::QuorumConfig {
        node: 0,
        generation: 0,
        tick_ms: 20,
        election_ms: 200,
        heartbeat_ms: 60,
        seed: 1,
    };
    let _ = raft::Quorum::new(&config, &[data]);
}

fn group_record(data: &[u8]) {
    let at = data.first().map_or(0, |n| usize::from(*n)).min(data.len());
    let (key, value) = data.split_at(at);
    let key = key.get(1..).unwrap_or(&[]);
    let _ = group::records::decode(key, None, 0);
    match group::records::decode(key, Some(value), 0) {
        Some(GroupRecord::Offset {
            group,
            topic,
            partition,
            committed: Some(committed),
        }) => {
            let key = group::records::offset_key(&group, &topic, partition);
            let value = group::records::offset_value(&committed);
            let again = group::records::decode(&key, Some(&value), 0);
            assert!(
                matches!(&again, Some(GroupRecord::Offset { group: g, topic: t, partition: p, committed: Some(c) })
                    if (g, t, *p, c) == (&group, &topic, partition, &committed)),
                "{again:?}"
            );
        }
        Some(GroupRecord::Group { state: Some(state), .. }) => {
            let (key, value) = (
                group::records::group_key(&state.id),
                group::records::group_value(&state),
            );
            let again = group::records::decode(&key, Some(&value), 0);
            assert!(
                matches!(&again, Some(GroupRecord::Group { state: Some(s), .. }) if group::records::group_value(s) == value),
                "{again:?}"
            );
        }
        _ => {}
    }
}

fn plain_batch() -> Vec<u8> {
    let record = |n: i64| NewRecord {
        timestamp: 1_700_000_000_000 + n,
        key: Some(Bytes::from_static(b"key")),
        value: Some(Bytes::from(vec![n as u8; 20])),
    };
    kafka_batch::build(&[record(0), record(1), record(2)], (7, 0, 0)).to_vec()
}

fn framed(key: i16, version: i16, header: i16, body: &impl Encodable) -> Vec<u8> {
    let mut out = BytesMut::new();
    RequestHeader::default()
        .with_request_api_key(key)
        .with_request_api_version(version)
        .with_client_id(Some(StrBytes::from_static_str("fuzz")))
        .encode(&mut out, header)
        .expect("encodes");
    body.encode(&mut out, version).expect("encodes");
    out.to_vec()
}

fn request_seeds() -> Vec<Vec<u8>> {
    let topic = || TopicName(StrBytes::from_static_str("topic"));
    let data = PartitionProduceData::default().with_records(Some(Bytes::from(plain_batch())));
    let produce = ProduceRequest::default().with_topic_data(vec![
        TopicProduceData::default()
            .with_name(topic())
            .with_partition_data(vec![data.clone(), data]),
    ]);
    let fetch = FetchRequest::default().with_topics(vec![
        FetchTopic::default()
            .with_topic(topic())
            .with_partitions(vec![FetchPartition::default(); 3]),
    ]);
    vec![
        framed(0, 7, 1, &produce),
        framed(0, 9, 2, &produce),
        framed(1, 4, 1, &fetch),
        framed(1, 12, 2, &fetch),
        framed(2, 7, 2, &ListOffsetsRequest::default()),
        framed(3, 12, 2, &MetadataRequest::default()),
        framed(8, 9, 2, &OffsetCommitRequest::default()),
        framed(11, 9, 2, &JoinGroupRequest::default()),
    ]
}

fn frame_seeds() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for request in request_seeds() {
        all.extend_from_slice(&(request.len() as u32).to_be_bytes());
        all.extend_from_slice(&request);
    }
    vec![all]
}

fn record_seeds() -> Vec<Vec<u8>> {
    let plain = plain_batch();
    let mut seeds = vec![plain.clone()];
    for codec in 1..=4 {
        let packed = compression::compress(codec, compression::Level(3), &plain[BATCH_HEADER_LEN..]).expect("packs");
        seeds.push(
            kafka_batch::with_records(&plain, codec, &packed)
                .expect("small")
                .to_vec(),
        );
    }
    seeds
}

fn packed_seeds() -> Vec<Vec<u8>> {
    (1..=4)
        .map(|codec| {
            let packed = compression::compress(codec, compression::Level(3), &plain_batch()).expect("packs");
            [&[codec as u8][..], &packed].concat()
        })
        .collect()
}

fn stored_batch(offset: i64) -> Batch {
    let payload = Bytes::from(plain_batch());
    let (info, _) = kafka_batch::parse(&payload).expect("sound");
    let mut header = BatchHeader::for_kafka(KEY, &info, &payload);
    header.base_offset = offset;
    header.last_offset = offset + 2;
    header.segment_position = BLOCK;
    Batch { header, payload }
}

fn batch_header_seeds() -> Vec<Vec<u8>> {
    let mut header = [0; HEADER_LEN];
    stored_batch(0).header.encode(&mut header);
    let mut file = vec![0; BLOCK as usize];
    FileHeader {
        kind: FileKind::Segment,
        topic: KEY.topic,
        number: 0,
        base: 0,
    }
    .encode(&mut file);
    file.truncate(64);
    vec![header.to_vec(), file]
}

fn journal_seeds() -> Vec<Vec<u8>> {
    // What a shard itself wrote.
    use millrace_engine::{
        log::{LogConfig, LogState},
        shard::Shard,
    };
    let host = SimHost::new();
    let config = shard_config();
    let done = host.run(async {
        let recovered = recovery::recover(&host, &config, 1).await?;
        let opened = ShardConfig {
            incarnation: recovered.incarnation,
            ..config.clone()
        };
        let shard = Shard::open(host.clone(), opened).await?;
        let s = shard.clone();
        host.spawn(async move { s.run_commits().await });
        shard.add_partition(LogState::new(KEY), LogConfig::default());
        for _ in 0..3 {
            let batch = stored_batch(0);
            let (info, _) = kafka_batch::parse(&batch.payload).expect("sound");
            let permit = shard.admit(batch.payload.len()).await;
            let appended = shard
                .append(KEY, 0, vec![(info, batch.payload)], permit)
                .expect("appended");
            let partition = shard.partition(&KEY).expect("added");
            partition.wait_high_watermark(appended.end_offset).await?;
        }
        Ok::<(), millrace_engine::StorageError>(())
    });
    done.expect("nothing cuts the run")
        .expect("a simulated disk without faults");
    let file = host.contents(&slot_path(&config.journal_dir(), 0, 0));
    vec![file[BLOCK as usize..5 * BLOCK as usize].to_vec()]
}

/// What a file's checksum covers, and the file.
fn archive_and_file(file: Vec<u8>) -> Vec<Vec<u8>> {
    let (len, _) = file[BLOCK as usize..].split_first_chunk::<8>().expect("whole blocks");
    let from = BLOCK as usize + 16;
    vec![file[from..from + u64::from_le_bytes(*len) as usize].to_vec(), file]
}

fn agreed_seeds() -> Vec<Vec<u8>> {
    let mut epochs = EpochCache::default();
    epochs.note(1, 0);
    let note = agreed::Agreed::of(7, &epochs).expect("there are records below");
    let host = SimHost::new();
    let dir = Path::new("/data/agreed");
    host.run(async { agreed::store(&host, dir, 0, &[(KEY, note)].into_iter().collect()).await })
        .expect("nothing cuts the run")
        .expect("a simulated disk without faults");
    archive_and_file(host.contents(&dir.join("0000.agreed")))
}

fn checkpoint_seeds() -> Vec<Vec<u8>> {
    let host = SimHost::new();
    let config = shard_config();
    let state = millrace_engine::log::LogState::new(KEY);
    let one = Arc::new(checkpoint::Captured::of(&state));
    let name = checkpoint::Name::Base { incarnation: 1 };
    let dir = config.checkpoint_dir();
    host.run(checkpoint::store(&host, &dir, name, Position::START, 1, vec![one]))
        .expect("nothing cuts the run")
        .expect("a simulated disk without faults");
    archive_and_file(host.contents(&config.checkpoint_dir().join("0000000001-base.checkpoint")))
}

fn index_seeds() -> Vec<Vec<u8>> {
    let host = SimHost::new();
    let mut index = SegmentIndex::new(BLOCK);
    index.note(&stored_batch(0).header);
    let path = Path::new("/data/index");
    host.run(index.store(&host, path, KEY, 0))
        .expect("nothing cuts the run")
        .expect("a simulated disk without faults");
    archive_and_file(host.contents(path))
}

fn peer_seeds() -> Vec<Vec<u8>> {
    let key = PartitionKey {
        topic: uuid::Uuid::from_u128(5),
        partition: 3,
    };
    let request = replica::Request {
        key: key.into(),
        epoch: 4,
        round: 1,
        high_watermark: 9,
        log_start: 2,
        order: replica::message::Order::Append,
    };
    let hello = peer::Hello {
        versions: (1, 1),
        kind: peer::StreamKind::Replica,
        cluster_id: "c".into(),
        node: 1,
        directory: [7; 16],
        start: 1,
        address: "h:1".into(),
        to_node: 2,
        to_shard: 0,
    };
    vec![
        replica::message::encode_request(&request, &[]).concat(),
        metadata::record::encode(&hello),
    ]
}

fn metadata_seeds() -> Vec<Vec<u8>> {
    vec![metadata::record::encode(&Vec::<metadata::MetadataRecord>::new())]
}

fn group_record_seeds() -> Vec<Vec<u8>> {
    let committed = group::offsets::Committed {
        offset: 5,
        leader_epoch: 1,
        metadata: "m".into(),
        commit_ms: 9,
    };
    let key = group::records::offset_key("group", "topic", 3);
    let value = group::records::offset_value(&committed);
    vec![[&[key.len() as u8 + 1][..], &key, &value].concat()]
}
