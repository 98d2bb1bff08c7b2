//! Records of `__consumer_offsets`, in the format that Kafka's own tools read.
//!
//! Keys: version 1 `group string | topic string | partition i32` for an offset, version 2 `group string` for a group.
//! Values: OffsetCommitValue version 3, GroupMetadataValue version 3; a null value removes.
//! Source: Kafka's OffsetCommitKey/Value.json and GroupMetadataKey/Value.json.

// A length or count that is stored or sent must not wrap.
#![cfg_attr(not(test), warn(clippy::cast_possible_truncation))]

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::{
    classic::{Group, GroupState, Member},
    offsets::Committed,
};

/// A record, decoded.
#[derive(Clone, Debug)]
pub enum GroupRecord {
    /// A commit, or its removal.
    Offset {
        /// Group.
        group: String,
        /// Topic.
        topic: String,
        /// Partition.
        partition: i32,
        /// `None` removes.
        committed: Option<Committed>,
    },
    /// A group's members, or its removal.
    Group {
        /// Group.
        group: String,
        /// `None` removes.
        state: Option<Box<Group>>,
    },
}

/// Strings of clients are not longer than the format can say: requests are held to that when they are decoded.
fn put_string(out: &mut BytesMut, s: &str) {
    out.put_i16(i16::try_from(s.len()).expect("a string of a request has at most 32,767 bytes"));
    out.put_slice(s.as_bytes());
}

fn put_nullable(out: &mut BytesMut, s: Option<&str>) {
    match s {
        Some(s) => put_string(out, s),
        None => out.put_i16(-1),
    }
}

fn put_bytes(out: &mut BytesMut, b: &[u8]) {
    out.put_i32(i32::try_from(b.len()).expect("bytes of a request are within a frame"));
    out.put_slice(b);
}

/// Key of a commit.
#[must_use]
pub fn offset_key(group: &str, topic: &str, partition: i32) -> Bytes {
    let mut out = BytesMut::new();
    out.put_i16(1);
    put_string(&mut out, group);
    put_string(&mut out, topic);
    out.put_i32(partition);
    out.freeze()
}

/// Value of a commit.
#[must_use]
pub fn offset_value(committed: &Committed) -> Bytes {
    let mut out = BytesMut::new();
    out.put_i16(3);
    out.put_i64(committed.offset);
    out.put_i32(committed.leader_epoch);
    put_string(&mut out, &committed.metadata);
    out.put_i64(committed.commit_ms);
    out.freeze()
}

/// Key of a group.
#[must_use]
pub fn group_key(group: &str) -> Bytes {
    let mut out = BytesMut::new();
    out.put_i16(2);
    put_string(&mut out, group);
    out.freeze()
}

/// Value of a group: its members and what they were assigned.
#[must_use]
pub fn group_value(group: &Group) -> Bytes {
    let mut out = BytesMut::new();
    out.put_i16(3);
    put_string(&mut out, group.protocol_type.as_deref().unwrap_or(""));
    out.put_i32(group.generation);
    put_nullable(&mut out, group.protocol.as_deref());
    put_nullable(&mut out, group.leader.as_deref());
    out.put_i64(group.state_since);
    out.put_i32(i32::try_from(group.members.len()).expect("members are connections"));
    let protocol = group.protocol.as_deref().unwrap_or("");
    for member in group.members.values() {
        put_string(&mut out, &member.id);
        put_nullable(&mut out, member.instance_id.as_deref());
        put_string(&mut out, &member.client_id);
        put_string(&mut out, &member.client_host);
        out.put_i32(member.rebalance_timeout_ms);
        out.put_i32(member.session_timeout_ms);
        put_bytes(&mut out, &member.metadata(protocol));
        put_bytes(&mut out, &member.assignment);
    }
    out.freeze()
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn need(&self, n: usize) -> Option<()> {
        (self.0.len() >= n).then_some(())
    }

    fn i16(&mut self) -> Option<i16> {
        self.need(2)?;
        Some(self.0.get_i16())
    }

    fn i32(&mut self) -> Option<i32> {
        self.need(4)?;
        Some(self.0.get_i32())
    }

    fn i64(&mut self) -> Option<i64> {
        self.need(8)?;
        Some(self.0.get_i64())
    }

    fn take(&mut self, len: usize) -> Option<Bytes> {
        self.need(len)?;
        Some(self.0.copy_to_bytes(len))
    }

    fn nullable(&mut self) -> Option<Option<String>> {
        match self.i16()? {
            -1 => Some(None),
            len => {
                let bytes = self.take(usize::try_from(len).ok()?)?;
                Some(Some(String::from_utf8(bytes.to_vec()).ok()?))
            }
        }
    }

    fn string(&mut self) -> Option<String> {
        self.nullable()?
    }

    fn bytes(&mut self) -> Option<Bytes> {
        let len = self.i32()?;
        self.take(usize::try_from(len).ok()?)
    }
}

/// Reads a record; `None` for one of another kind (newer Kafka versions know more) or one that does not decode.
#[must_use]
pub fn decode(key: &[u8], value: Option<&[u8]>, now: i64) -> Option<GroupRecord> {
    let mut key = Reader(key);
    match key.i16()? {
        0 | 1 => Some(GroupRecord::Offset {
            group: key.string()?,
            topic: key.string()?,
            partition: key.i32()?,
            committed: match value {
                Some(value) => Some(decode_offset(value)?),
                None => None,
            },
        }),
        2 => {
            let group = key.string()?;
            let state = match value {
                Some(value) => Some(Box::new(decode_group(group.clone(), value, now)?)),
                None => None,
            };
            Some(GroupRecord::Group { group, state })
        }
        _ => None,
    }
}

fn decode_offset(value: &[u8]) -> Option<Committed> {
    let mut value = Reader(value);
    let version = value.i16()?;
    if !(0..=3).contains(&version) {
        return None;
    }
    Some(Committed {
        offset: value.i64()?,
        leader_epoch: if version == 3 { value.i32()? } else { -1 },
        metadata: value.string()?,
        commit_ms: value.i64()?,
    })
}

fn decode_group(id: String, value: &[u8], now: i64) -> Option<Group> {
    let mut value = Reader(value);
    let version = value.i16()?;
    if !(0..=3).contains(&version) {
        return None;
    }
    let mut group = Group::new(id, now);
    group.protocol_type = value.string().filter(|t| !t.is_empty());
    group.generation = value.i32()?;
    group.protocol = value.nullable()?;
    group.leader = value.nullable()?;
    group.state_since = if version >= 2 { value.i64()? } else { now };
    for _ in 0..value.i32()? {
        let id = value.string()?;
        let instance_id = if version >= 3 { value.nullable()? } else { None };
        let client_id = value.string()?;
        let client_host = value.string()?;
        let rebalance_timeout_ms = if version >= 1 { value.i32()? } else { 0 };
        let session_timeout_ms = value.i32()?;
        let subscription = value.bytes()?;
        let assignment = value.bytes()?;
        if let Some(instance) = &instance_id {
            group.instances.insert(instance.clone(), id.clone());
        }
        group.members.insert(
            id.clone(),
            Member {
                id,
                instance_id,
                client_id,
                client_host,
                session_timeout_ms,
                rebalance_timeout_ms: if version >= 1 {
                    rebalance_timeout_ms
                } else {
                    session_timeout_ms
                },
                protocols: vec![(group.protocol.clone().unwrap_or_default(), subscription)],
                assignment,
                awaiting_join: None,
                awaiting_sync: None,
                session_deadline: now + i64::from(session_timeout_ms),
            },
        );
    }
    if !group.members.is_empty() {
        group.state = GroupState::Stable;
    }
    Some(group)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let committed = Committed {
            offset: 42,
            leader_epoch: 3,
            metadata: "note".into(),
            commit_ms: 99,
        };
        let key = offset_key("g", "t", 7);
        match decode(&key, Some(&offset_value(&committed)), 0) {
            Some(GroupRecord::Offset {
                group,
                topic,
                partition,
                committed: Some(c),
            }) => assert_eq!((group.as_str(), topic.as_str(), partition, c), ("g", "t", 7, committed)),
            other => panic!("{other:?}"),
        }
        let mut group = Group::new("g".into(), 5);
        group.generation = 4;
        group.protocol_type = Some("consumer".into());
        group.protocol = Some("range".into());
        group.leader = Some("m".into());
        group.members.insert(
            "m".into(),
            Member {
                id: "m".into(),
                instance_id: Some("i".into()),
                client_id: "c".into(),
                client_host: "/h".into(),
                session_timeout_ms: 10,
                rebalance_timeout_ms: 20,
                protocols: vec![("range".into(), Bytes::from_static(b"sub"))],
                assignment: Bytes::from_static(b"asg"),
                awaiting_join: None,
                awaiting_sync: None,
                session_deadline: 0,
            },
        );
        match decode(&group_key("g"), Some(&group_value(&group)), 100) {
            Some(GroupRecord::Group { state: Some(g), .. }) => {
                assert_eq!(group_value(&g), group_value(&group));
                assert_eq!(g.state, GroupState::Stable);
                assert_eq!(g.instances["i"], "m");
                assert_eq!(g.members["m"].session_deadline, 110);
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn cut_records_are_refused() {
        let key = offset_key("group", "topic", 7);
        for len in 0..key.len() {
            assert!(decode(&key[..len], None, 0).is_none(), "{len} bytes");
        }
    }
}
