//! Bytes written by every released format are read for ever after. A new format adds files; it never changes these.
//!
//! `MILLRACE_TEST_WRITE_GOLDEN=1` writes the files of the current format where they are missing.

use std::{fs, path::Path, sync::Arc};

use millrace_engine::{
    PartitionKey,
    agreed::{self, Agreed},
    batch::{BatchHeader, PayloadFormat, RecordKind},
    checkpoint,
    disk::sim::SimHost,
    host::{Host, HostFile, OpenMode},
    index::SegmentIndex,
    journal::{Position, format::GroupHeader},
    layout::{BLOCK, FileHeader, FileKind},
    log::{LogConfig, LogState, SequenceCheck},
};
use uuid::Uuid;

fn golden(name: &str, bytes: &[u8]) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if !path.exists() && std::env::var_os("MILLRACE_TEST_WRITE_GOLDEN").is_some() {
        fs::write(&path, bytes).expect("written");
    }
    let stored = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(stored, bytes, "{name}: this build writes other bytes than format 1");
    stored
}

#[test]
fn batch_header_1() {
    let header = BatchHeader {
        kind: RecordKind::Extent,
        format: PayloadFormat::KafkaV2,
        key: PartitionKey {
            topic: Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff),
            partition: 7,
        },
        base_offset: 1_000_001,
        last_offset: 1_000_099,
        leader_epoch: 5,
        record_count: 99,
        attributes: 4,
        base_timestamp: 1_700_000_000_000,
        max_timestamp: 1_700_000_000_999,
        producer_id: 42,
        producer_epoch: 3,
        base_sequence: 77,
        payload_len: 12_345,
        payload_crc: 0xdead_beef,
        segment_base: 1_000_000,
        segment_position: 8192,
    };
    let mut bytes = [0; 128];
    header.encode(&mut bytes);
    let stored = golden("batch-header-1", &bytes);
    assert_eq!(
        BatchHeader::decode(stored.first_chunk().expect("128 bytes")),
        Ok(header)
    );
}

#[test]
fn group_header_1() {
    let header = GroupHeader {
        incarnation: 9,
        shard: 3,
        position: Position { seq: 11, offset: 4096 },
        flushed: Position {
            seq: 10,
            offset: 65_536,
        },
        body_len: 1280,
        record_count: 2,
        body_crc: 0x1234_5678,
    };
    let mut bytes = [0; 128];
    header.encode(&mut bytes);
    assert_eq!(GroupHeader::decode(&golden("group-header-1", &bytes)), Some(header));
}

#[test]
fn file_header_1_and_what_is_refused() {
    let header = FileHeader {
        kind: FileKind::Segment,
        topic: Uuid::from_u128(5),
        number: 6,
        base: 7,
    };
    let mut bytes = vec![0; 4096];
    header.encode(&mut bytes);
    let stored = golden("file-header-1", &bytes);
    let path = Path::new("segment");
    assert_eq!(
        FileHeader::decode(&stored, FileKind::Segment, path).expect("its own format"),
        header
    );
    // One byte each: magic, version, feature bits, kind (with its checksum), checksum.
    for (byte, expected) in [
        (0, "magic"),
        (8, "format version"),
        (12, "feature bits"),
        (20, "checksum"),
        (44, "checksum"),
    ] {
        let mut other = stored.clone();
        other[byte] ^= 0x40;
        let refused = FileHeader::decode(&other, FileKind::Segment, path)
            .expect_err("changed")
            .to_string();
        assert!(refused.contains(expected), "byte {byte}: {refused}");
    }
    let refused = FileHeader::decode(&stored, FileKind::Journal, path).expect_err("another kind");
    assert!(refused.to_string().contains("not a Journal file"));
}

#[test]
fn any_damage_of_a_header_is_seen() {
    let bytes: Vec<u8> =
        fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/batch-header-1")).expect("there");
    for byte in 0..bytes.len() {
        for bit in 0..8 {
            let mut damaged: [u8; 128] = bytes.clone().try_into().expect("128 bytes");
            damaged[byte] ^= 1 << bit;
            assert!(BatchHeader::decode(&damaged).is_err(), "byte {byte} bit {bit}");
        }
    }
}

const KEY: PartitionKey = PartitionKey {
    topic: Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff),
    partition: 7,
};

/// The `n`th of some batches of an idempotent producer, 40 KB each.
fn header(n: i64) -> BatchHeader {
    BatchHeader {
        kind: RecordKind::Batch,
        format: PayloadFormat::KafkaV2,
        key: KEY,
        base_offset: 0,
        last_offset: 9,
        leader_epoch: 0,
        record_count: 10,
        attributes: 0,
        base_timestamp: 1_700_000_000_000 + n,
        max_timestamp: 1_700_000_000_005 + n,
        producer_id: 42,
        producer_epoch: 3,
        base_sequence: (n * 10) as i32,
        payload_len: 40_000,
        payload_crc: 0xdead_beef,
        segment_base: 0,
        segment_position: 0,
    }
}

/// A log of eight batches in two epochs and more than one segment, and their headers as they were placed.
fn log() -> (LogState, Vec<BatchHeader>) {
    let config = LogConfig {
        segment_bytes: 200_000,
        ..LogConfig::default()
    };
    let mut state = LogState::new(KEY);
    let mut headers = Vec::new();
    for n in 0..8 {
        let mut header = header(n);
        header.leader_epoch = 4 + i32::from(n > 5);
        // Five of them are the producer's.
        if n < 3 {
            header.producer_id = -1;
        }
        state.assign(&mut header, &config, 1_700_000_000_000, false);
        headers.push(header);
    }
    (state, headers)
}

fn on_a_new_disk(path: &Path, bytes: &[u8]) -> SimHost {
    let host = SimHost::new();
    let done = host.run(async {
        let file = host.open(path, OpenMode::Create).await?;
        let mut buffer = host.buffer(bytes.len());
        buffer.copy_from_slice(bytes);
        file.write_at(buffer, 0).await
    });
    done.expect("nothing cuts the run").expect("a disk without faults");
    host
}

#[test]
fn checkpoint_1() {
    let (state, _) = log();
    let dir = Path::new("/data/checkpoint");
    let path = dir.join("0000000006-0002.checkpoint");
    let host = SimHost::new();
    host.run(async {
        let shard = checkpoint::Name::Shard {
            incarnation: 6,
            shard: 2,
        };
        let replay_from = Position { seq: 5, offset: 8192 };
        let captured = vec![Arc::new(checkpoint::Captured::of(&state))];
        checkpoint::store(&host, dir, shard, replay_from, 0, captured).await
    })
    .expect("nothing cuts the run")
    .expect("a disk without faults");
    let stored = golden("checkpoint-1", &host.contents(&path));

    let host = on_a_new_disk(&path, &stored);
    let found = host
        .run(async {
            let name = checkpoint::Name::Base { incarnation: 6 };
            checkpoint::store(&host, dir, name, Position::START, 0, Vec::new()).await?;
            checkpoint::load(&host, dir).await
        })
        .expect("nothing cuts the run")
        .expect("it is read");
    let (shard, read) = found.shards.into_iter().next().expect("the shard's");
    assert_eq!((shard, read.replay_from()), (2, Position { seq: 5, offset: 8192 }));
    let log = read.partitions.into_iter().next().expect("the partition").restore();
    assert_eq!((log.key, log.log_start(), log.log_end()), (KEY, 0, 80));
    assert_eq!(log.segments(), state.segments());
    assert!(log.segments().len() > 1, "the sample has several segments");
    assert_eq!(log.epochs.latest(), Some(5));
    assert_eq!(log.epochs.end_offset(4, 80), Some((4, 60)));
    // The producer's next batch is new, its last one a duplicate.
    assert_eq!(log.producers.check(&header(8)).ok(), Some(SequenceCheck::New));
    assert_eq!(
        log.producers.check(&header(7)).ok(),
        state.producers.check(&header(7)).ok()
    );
}

#[test]
fn agreed_1() {
    let (state, _) = log();
    let dir = Path::new("/data/agreed");
    let path = dir.join("0002.agreed");
    let note = Agreed::of(70, &state.epochs).expect("there are records below");
    let host = SimHost::new();
    host.run(async { agreed::store(&host, dir, 2, &[(KEY, note)].into_iter().collect()).await })
        .expect("nothing cuts the run")
        .expect("a disk without faults");
    let stored = golden("agreed-1", &host.contents(&path));

    let host = on_a_new_disk(&path, &stored);
    let read = (host.run(agreed::load(&host, dir)).expect("ends")).expect("it is read");
    assert_eq!(read[&KEY].recall(&state.epochs, 80), Some(70));
    assert_eq!(read.len(), 1);
}

#[test]
fn index_1() {
    let (_, headers) = log();
    let path = Path::new("/data/index");
    let mut index = SegmentIndex::new(BLOCK);
    let first = headers.iter().filter(|h| h.segment_base == 0);
    first.clone().for_each(|h| index.note(h));
    let host = SimHost::new();
    host.run(index.store(&host, path, KEY, 0))
        .expect("nothing cuts the run")
        .expect("a disk without faults");
    let stored = golden("index-1", &host.contents(path));

    let host = on_a_new_disk(path, &stored);
    let read = host
        .run(SegmentIndex::load(&host, path))
        .expect("ends")
        .expect("it is read");
    assert_eq!(read.len(), index.len());
    for h in first {
        assert_eq!(read.position_of(h.base_offset), index.position_of(h.base_offset));
        assert_eq!(
            read.offset_of_time(h.max_timestamp),
            index.offset_of_time(h.max_timestamp)
        );
    }
}
