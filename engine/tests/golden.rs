//! Bytes written by every released format are read for ever after. A new format adds files; it never changes these.
//!
//! `MILLRACE_TEST_WRITE_GOLDEN=1` writes the files of the current format where they are missing.

use std::{fs, path::Path};

use millrace_engine::{
    PartitionKey,
    batch::{BatchHeader, PayloadFormat, RecordKind},
    journal::{Position, format::GroupHeader},
    layout::{FileHeader, FileKind},
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
