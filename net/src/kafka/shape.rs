//! Walks a request's bytes along its schema before it is decoded, so that no count or length from a socket is
//! trusted: the decoder allocates for as many elements as an array states, and a few bytes can state two
//! thousand million of them.
//!
//! Schemas are written in a small notation, one string per API, read once ([`Field`]); versions as `@from`, `@from-to`:
//! `b` int8/bool, `h` int16, `i` int32, `l` int64, `d` float64, `u` uuid, `t` uuid of a topic, `s` string, `w` string that names a topic, `.` a place to be noted, `n` nullable string, `y` bytes,
//! `[…]` array of structures, `{…}` array of plain elements. Source: Kafka's message definitions.

use std::{
    ops::{Range, RangeInclusive},
    sync::LazyLock,
};

use kafka_protocol::messages::ApiKey;
use thiserror::Error;

/// Bytes of a string; Kafka's limit, which only the compact encoding could exceed.
pub const STRING_MAX: usize = i16::MAX as usize;
/// Elements of all arrays of a request; Kafka 4.4 allows so many in one array.
pub const ELEMENTS_MAX: usize = 1_000_000;
/// Tagged fields of one structure; Kafka 4.4's limit.
const TAGS_MAX: i64 = 10_000;

/// Why a request does not have its API's shape.
#[derive(Debug, Error, PartialEq, Eq, Clone, Copy)]
pub enum ShapeError {
    /// It ends inside a field.
    #[error("it ends inside a field")]
    Short,
    /// A count or length that its bytes cannot hold.
    #[error("a count of {count} where {left} bytes are left")]
    Count {
        /// As stated.
        count: i64,
        /// To the end.
        left: usize,
    },
    /// A number longer than its type.
    #[error("an overlong number")]
    Number,
    /// A string that no other encoding could carry.
    #[error("a string of {len} bytes, where {STRING_MAX} are the most")]
    String {
        /// As stated.
        len: i64,
    },
    /// More elements of arrays, or more tags, than a request may have.
    #[error("more than {ELEMENTS_MAX} elements of arrays, or {TAGS_MAX} tags in one place")]
    Elements,
}

/// `(flexible from version, fields)`.
fn notation(api: ApiKey) -> Option<(i16, &'static str)> {
    Some(match api {
        ApiKey::Produce => (9, "n@3 h i [s@3-12 u@13 [i y]]"),
        ApiKey::Fetch => (
            12,
            "i@0-14 i i i@3 b@4 i@7 i@7 [s@0-12 u@13 [i i@9 l i@12 l@5 i]] [s@7-12 u@13 {i}@7]@7 s@11",
        ),
        ApiKey::ListOffsets => (6, "i b@2 [s [i i@4 l]] i@10"),
        ApiKey::Metadata => (9, "[u@10 n] b@4 b@8-10 b@8"),
        ApiKey::OffsetCommit => (8, "s i@1 s@1 n@7 l@2-4 [s@0-9 t@10 [i l i@6 l@1-1 n]]"),
        ApiKey::OffsetFetch => (6, "s@0-7 [s {i}]@0-7 [s n@9 i@9 [s@8-9 t@10 {i}]]@8 b@7"),
        ApiKey::FindCoordinator => (3, "s@0-3 b@1 {s}@4"),
        ApiKey::JoinGroup => (6, "s i i@1 s n@5 s [s y] n@8"),
        ApiKey::Heartbeat => (4, "s i s n@3"),
        ApiKey::LeaveGroup => (4, "s s@0-2 [s n n@5]@3"),
        ApiKey::SyncGroup => (4, "s i s n@3 n@5 n@5 [s y]"),
        ApiKey::DescribeGroups => (5, "{s} b@3"),
        ApiKey::ListGroups => (3, "{s}@4 {s}@5"),
        ApiKey::ApiVersions => (3, "s@3 s@3"),
        ApiKey::CreateTopics => (5, "[s i h [i {i}] [s n]] i b@1"),
        ApiKey::DeleteTopics => (4, "[n u]@6 {s}@0-5 i"),
        ApiKey::DeleteRecords => (2, "[s [i l]] i"),
        ApiKey::InitProducerId => (2, "n i l@3 h@3"),
        ApiKey::OffsetForLeaderEpoch => (4, "i@3 [s [i i@2 i]]"),
        ApiKey::DescribeAcls => (2, "b n b@1 n n b b"),
        ApiKey::DescribeConfigs => (4, "[b s {s}] b@1 b@3"),
        ApiKey::AlterConfigs => (2, "[b s [s n]] b"),
        ApiKey::AlterReplicaLogDirs => (2, "[s [s {i}]]"),
        ApiKey::DescribeLogDirs => (2, "[s {i}]"),
        ApiKey::CreatePartitions => (2, "[s i [{i}]] i b"),
        ApiKey::DeleteGroups => (2, "{s}"),
        ApiKey::ElectLeaders => (2, "b@1 [s {i}] i"),
        ApiKey::DescribeQuorum => (0, "[s [i]]"),
        ApiKey::IncrementalAlterConfigs => (1, "[b s [s b n]] b"),
        ApiKey::OffsetDelete => (i16::MAX, "s [s [i]]"),
        ApiKey::DescribeCluster => (0, "b b@1 b@2"),
        ApiKey::DescribeProducers => (0, "[s {i}]"),
        ApiKey::AlterPartitionReassignments => (0, "i b@1 [s [i {i}]]"),
        ApiKey::ListPartitionReassignments => (0, "i [s {i}]"),
        ApiKey::UpdateFeatures => (0, "i [s h b@0-0 b@1] b@1"),
        ApiKey::UnregisterBroker => (0, "i"),
        ApiKey::AddRaftVoter => (0, "n i i u [s s h]"),
        ApiKey::RemoveRaftVoter => (0, "n i u"),
        ApiKey::ListConfigResources => (0, "{b}@1"),
        ApiKey::DescribeTopicPartitions => (0, "[s] i ?[s i]"),
        _ => return None,
    })
}

/// What a letter or bracket of the notation stands for.
enum Kind {
    /// So many bytes.
    Fixed(usize),
    TopicId,
    TopicName,
    Place,
    String,
    Bytes,
    /// A structure that may be missing.
    Nullable(Box<[Field]>),
    Structures(Box<[Field]>),
    Elements(Box<[Field]>),
}

/// A field of a schema.
struct Field {
    kind: Kind,
    versions: RangeInclusive<i16>,
}

impl Field {
    fn parse_all(schema: &str) -> Box<[Self]> {
        let mut fields = Vec::new();
        let mut rest = schema.trim_start();
        while !rest.is_empty() {
            let (field, after) = split_field(rest);
            let (versions, after) = split_versions(after);
            rest = after.trim_start();
            fields.push(Self {
                kind: Kind::parse(field),
                versions,
            });
        }
        fields.into()
    }
}

impl Kind {
    fn parse(field: &str) -> Self {
        let within = |brackets: &str| Field::parse_all(&brackets[1..brackets.len() - 1]);
        match field.as_bytes()[0] {
            b'b' => Self::Fixed(1),
            b'h' => Self::Fixed(2),
            b'i' => Self::Fixed(4),
            b'l' | b'd' => Self::Fixed(8),
            b'u' => Self::Fixed(16),
            b't' => Self::TopicId,
            b'w' => Self::TopicName,
            b'.' => Self::Place,
            b's' | b'n' => Self::String,
            b'y' => Self::Bytes,
            b'?' => Self::Nullable(within(&field[1..])),
            b'[' => Self::Structures(within(field)),
            b'{' => Self::Elements(within(field)),
            _ => unreachable!("schemas are constants of known letters: {field}"),
        }
    }
}

/// A request's schema.
struct Schema {
    flexible_from: i16,
    fields: Box<[Field]>,
}

/// By the numbers of their APIs.
static REQUESTS: LazyLock<Box<[Option<Schema>]>> = LazyLock::new(|| {
    let parsed = |api| {
        let (flexible_from, notation) = notation(api)?;
        let fields = Field::parse_all(notation);
        Some(Schema { flexible_from, fields })
    };
    let last = ApiKey::iter().map(|api| api as i16).max().unwrap_or(0);
    (0..=last).map(|key| parsed(ApiKey::try_from(key).ok()?)).collect()
});

static OFFSET_COMMIT_RESPONSE: LazyLock<Box<[Field]>> = LazyLock::new(|| Field::parse_all("i [w [i h]]"));
static OFFSET_FETCH_RESPONSE: LazyLock<Box<[Field]>> = LazyLock::new(|| Field::parse_all("i [s [w [i l i n h]] h]"));
static DESCRIBE_LOG_DIRS_RESPONSE: LazyLock<Box<[Field]>> =
    LazyLock::new(|| Field::parse_all("i h [h s [s [i l l b]] l l .]"));

struct Walk<'a> {
    left: &'a [u8],
    /// Length of all.
    total: usize,
    /// Where topics' ids or names (`t`, `w`) stand, with their lengths, and places without anything (`.`).
    noted: Vec<Range<usize>>,
    /// Elements of arrays that there may still be.
    elements_left: i64,
    /// Bytes of a string at most.
    string_max: i64,
    version: i16,
    flexible: bool,
}

impl<'a> Walk<'a> {
    fn new(bytes: &'a [u8], version: i16, flexible: bool) -> Self {
        Self {
            left: bytes,
            total: bytes.len(),
            noted: Vec::new(),
            elements_left: ELEMENTS_MAX as i64,
            string_max: STRING_MAX as i64,
            version,
            flexible,
        }
    }

    fn skip(&mut self, n: usize) -> Result<(), ShapeError> {
        self.left = self.left.get(n..).ok_or(ShapeError::Short)?;
        Ok(())
    }

    fn int(&mut self, width: usize) -> Result<i64, ShapeError> {
        let bytes = self.left.get(..width).ok_or(ShapeError::Short)?;
        let value = match *bytes {
            [a, b] => i64::from(i16::from_be_bytes([a, b])),
            [a, b, c, d] => i64::from(i32::from_be_bytes([a, b, c, d])),
            _ => 0,
        };
        self.skip(width)?;
        Ok(value)
    }

    fn unsigned_varint(&mut self) -> Result<i64, ShapeError> {
        let mut value = 0_u64;
        for shift in [0, 7, 14, 21, 28] {
            let (&byte, rest) = self.left.split_first().ok_or(ShapeError::Short)?;
            self.left = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value as i64);
            }
        }
        Err(ShapeError::Number)
    }

    /// A length or count, -1 for null.
    fn count(&mut self, width: usize) -> Result<i64, ShapeError> {
        if self.flexible {
            Ok(self.unsigned_varint()? - 1)
        } else {
            self.int(width)
        }
    }

    fn sized(&mut self, width: usize) -> Result<(), ShapeError> {
        let len = self.count(width)?;
        let left = self.left.len();
        match usize::try_from(len) {
            Ok(len) if len <= left => self.skip(len),
            // Null, or a negative length that the decoder refuses by itself.
            Err(_) => Ok(()),
            Ok(_) => Err(ShapeError::Count { count: len, left }),
        }
    }

    fn string(&mut self) -> Result<(), ShapeError> {
        let before = self.left;
        let len = self.count(2)?;
        if len > self.string_max {
            return Err(ShapeError::String { len });
        }
        self.left = before;
        self.sized(2)
    }

    fn tags(&mut self) -> Result<(), ShapeError> {
        if !self.flexible {
            return Ok(());
        }
        let tags = self.unsigned_varint()?;
        if tags > TAGS_MAX {
            return Err(ShapeError::Elements);
        }
        for _ in 0..tags {
            self.unsigned_varint()?;
            let len = self.unsigned_varint()?;
            self.skip(usize::try_from(len).map_err(|_| ShapeError::Number)?)?;
        }
        Ok(())
    }

    fn fields(&mut self, fields: &[Field]) -> Result<(), ShapeError> {
        for field in fields {
            if field.versions.contains(&self.version) {
                self.field(&field.kind)?;
            }
        }
        Ok(())
    }

    fn field(&mut self, kind: &Kind) -> Result<(), ShapeError> {
        let at = self.total - self.left.len();
        match kind {
            Kind::Fixed(width) => self.skip(*width),
            Kind::String => self.string(),
            Kind::Bytes => self.sized(4),
            Kind::TopicId => {
                self.noted.push(at..at + 16);
                self.skip(16)
            }
            Kind::TopicName => {
                self.sized(2)?;
                self.noted.push(at..self.total - self.left.len());
                Ok(())
            }
            Kind::Place => {
                self.noted.push(at..at);
                Ok(())
            }
            Kind::Nullable(fields) => {
                // It begins with a byte that says whether it is there.
                let there = *self.left.first().ok_or(ShapeError::Short)? as i8;
                self.skip(1)?;
                if there >= 0 {
                    self.structure(fields)?;
                }
                Ok(())
            }
            Kind::Structures(fields) => (0..self.elements()?).try_for_each(|_| self.structure(fields)),
            Kind::Elements(fields) => (0..self.elements()?).try_for_each(|_| self.fields(fields)),
        }
    }

    fn structure(&mut self, fields: &[Field]) -> Result<(), ShapeError> {
        self.fields(fields)?;
        self.tags()
    }

    /// How many elements an array states, none for null.
    fn elements(&mut self) -> Result<i64, ShapeError> {
        let count = self.count(4)?;
        let left = self.left.len();
        // Every element takes at least a byte.
        if count > left as i64 {
            return Err(ShapeError::Count { count, left });
        }
        self.elements_left -= count.max(0);
        if self.elements_left < 0 {
            return Err(ShapeError::Elements);
        }
        Ok(count)
    }
}

/// The first field of a schema (with its brackets) and what follows.
fn split_field(schema: &str) -> (&str, &str) {
    let mut depth = 0;
    for (at, c) in schema.char_indices() {
        match c {
            '[' | '{' => depth += 1,
            ']' | '}' => depth -= 1,
            '?' => continue,
            _ => {}
        }
        if depth == 0 {
            return schema.split_at(at + 1);
        }
    }
    unreachable!("schemas are constants with matching brackets: {schema}")
}

fn split_versions(schema: &str) -> (RangeInclusive<i16>, &str) {
    let Some(rest) = schema.strip_prefix('@') else {
        return (0..=i16::MAX, schema);
    };
    let end = rest.find([' ', '[', ']', '{', '}']).unwrap_or(rest.len());
    let (versions, rest) = rest.split_at(end);
    let (from, to) = versions.split_once('-').unwrap_or((versions, "32767"));
    let number = |s: &str| s.parse().expect("schemas are constants with numeric versions");
    (number(from)..=number(to), rest)
}

/// What the bytes of a request's body hold.
#[derive(Default)]
pub struct Shape {
    /// Where the ids of topics stand.
    pub topics: Vec<Range<usize>>,
    /// Elements of all its arrays.
    pub elements: usize,
}

/// Checks a request's body.
///
/// # Errors
/// [`ShapeError`].
pub fn check(api: ApiKey, version: i16, body: &[u8]) -> Result<Shape, ShapeError> {
    let Some(Some(schema)) = REQUESTS.get(api as usize) else {
        return Ok(Shape::default());
    };
    let mut walk = Walk::new(body, version, version >= schema.flexible_from);
    walk.structure(&schema.fields)?;
    Ok(Shape {
        topics: walk.noted,
        elements: ELEMENTS_MAX - usize::try_from(walk.elements_left).unwrap_or(0),
    })
}

/// Places in the body of a response: the names of topics, with their lengths, in OffsetCommit and OffsetFetch 9, the ends of folders'
/// fields in DescribeLogDirs 4.
///
/// # Errors
/// [`ShapeError`].
pub fn response_places(api: ApiKey, body: &[u8]) -> Result<Vec<Range<usize>>, ShapeError> {
    let (version, fields) = match api {
        ApiKey::OffsetCommit => (9, &OFFSET_COMMIT_RESPONSE),
        ApiKey::DescribeLogDirs => (4, &DESCRIBE_LOG_DIRS_RESPONSE),
        _ => (9, &OFFSET_FETCH_RESPONSE),
    };
    let mut walk = Walk::new(body, version, true);
    // What was made here is bounded by what was asked for.
    (walk.elements_left, walk.string_max) = (i64::MAX, i64::MAX);
    walk.structure(fields)?;
    Ok(walk.noted)
}

/// Checks a request header: key, version, correlation id, client id (never compact), then tags from version 2 on.
///
/// # Errors
/// [`ShapeError`].
pub fn check_header(frame: &[u8], header_version: i16) -> Result<(), ShapeError> {
    let mut walk = Walk::new(frame, header_version, false);
    walk.skip(8)?;
    if header_version >= 1 {
        walk.sized(2)?;
    }
    walk.flexible = header_version >= 2;
    walk.tags()
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use kafka_protocol::{messages::*, protocol::Encodable};

    use super::*;

    fn encoded<R: Encodable>(request: &R, version: i16) -> Vec<u8> {
        let mut out = BytesMut::new();
        request.encode(&mut out, version).expect("encodes");
        out.to_vec()
    }

    #[test]
    fn counts_beyond_the_bytes_are_refused() {
        // Metadata v1: an array of two thousand million topics.
        let body = [0x7f, 0xff, 0xff, 0xff, 0, 1, b'a'];
        assert!(matches!(
            check(ApiKey::Metadata, 1, &body),
            Err(ShapeError::Count { .. })
        ));
        // The same, compact.
        let body = [0xff, 0xff, 0xff, 0xff, 0x0f, 0];
        assert!(matches!(
            check(ApiKey::Metadata, 12, &body),
            Err(ShapeError::Count { .. })
        ));
    }

    #[test]
    fn strings_and_arrays_are_bounded_where_their_encoding_is_not() {
        // FindCoordinator 4: a byte, and an array of strings.
        let keys = |keys: &[usize]| {
            let request = FindCoordinatorRequest::default()
                .with_coordinator_keys(keys.iter().map(|len| "k".repeat(*len).into()).collect());
            check(ApiKey::FindCoordinator, 4, &encoded(&request, 4)).map(drop)
        };
        assert_eq!(keys(&[STRING_MAX, 0, STRING_MAX]), Ok(()));
        let len = STRING_MAX + 1;
        assert_eq!(keys(&[1, len]), Err(ShapeError::String { len: len as i64 }));
        assert_eq!(keys(&vec![0; ELEMENTS_MAX]), Ok(()));
        assert_eq!(keys(&vec![0; ELEMENTS_MAX + 1]), Err(ShapeError::Elements));
    }

    #[test]
    fn every_version_of_a_default_request_has_its_shape() {
        macro_rules! all {
            ($($api:ident $request:ident),* $(,)?) => {$({
                let served = super::super::versions::find(ApiKey::$api as i16).expect("served");
                for version in served.min..=served.max {
                    if matches!(ApiKey::$api, ApiKey::Produce) && version < 3 { continue; }
                    let mut out = BytesMut::new();
                    if $request::default().encode(&mut out, version).is_err() { continue; }
                    assert_eq!(check(ApiKey::$api, version, &out).map(drop), Ok(()), "{} v{version}", stringify!($api));
                    let mut walk_to_the_end = out.to_vec();
                    walk_to_the_end.pop();
                    if !walk_to_the_end.is_empty() || out.len() == 1 {
                        assert!(check(ApiKey::$api, version, &walk_to_the_end).is_err(),
                            "{} v{version}: the last byte belongs to it", stringify!($api));
                    }
                }
            })*};
        }
        all! {
            Produce ProduceRequest, Fetch FetchRequest, ListOffsets ListOffsetsRequest, Metadata MetadataRequest,
            OffsetCommit OffsetCommitRequest, OffsetFetch OffsetFetchRequest, FindCoordinator FindCoordinatorRequest,
            JoinGroup JoinGroupRequest, Heartbeat HeartbeatRequest, LeaveGroup LeaveGroupRequest,
            SyncGroup SyncGroupRequest, DescribeGroups DescribeGroupsRequest, ListGroups ListGroupsRequest,
            ApiVersions ApiVersionsRequest, CreateTopics CreateTopicsRequest, DeleteTopics DeleteTopicsRequest,
            DeleteRecords DeleteRecordsRequest, InitProducerId InitProducerIdRequest,
            OffsetForLeaderEpoch OffsetForLeaderEpochRequest, DescribeAcls DescribeAclsRequest,
            DescribeConfigs DescribeConfigsRequest,
            AlterConfigs AlterConfigsRequest, DescribeLogDirs DescribeLogDirsRequest,
            AlterReplicaLogDirs AlterReplicaLogDirsRequest,
            CreatePartitions CreatePartitionsRequest, DeleteGroups DeleteGroupsRequest,
            IncrementalAlterConfigs IncrementalAlterConfigsRequest, OffsetDelete OffsetDeleteRequest,
            ElectLeaders ElectLeadersRequest, DescribeQuorum DescribeQuorumRequest,
            DescribeCluster DescribeClusterRequest, DescribeProducers DescribeProducersRequest,
            DescribeTopicPartitions DescribeTopicPartitionsRequest, ListConfigResources ListConfigResourcesRequest,
            AlterPartitionReassignments AlterPartitionReassignmentsRequest,
            ListPartitionReassignments ListPartitionReassignmentsRequest, UpdateFeatures UpdateFeaturesRequest,
            UnregisterBroker UnregisterBrokerRequest, AddRaftVoter AddRaftVoterRequest,
            RemoveRaftVoter RemoveRaftVoterRequest,
        }
        for served in super::super::versions::SERVED {
            assert!(
                matches!(REQUESTS.get(served.api as usize), Some(Some(_))),
                "{:?} is served unchecked",
                served.api
            );
        }
    }

    #[test]
    fn nested_arrays_are_walked() {
        use kafka_protocol::messages::{create_topics_request::*, fetch_request::*};
        let fetch = FetchRequest::default().with_topics(vec![
            FetchTopic::default().with_partitions(vec![FetchPartition::default(); 3]),
            FetchTopic::default().with_partitions(vec![FetchPartition::default()]),
        ]);
        for version in 4..=12 {
            assert_eq!(
                check(ApiKey::Fetch, version, &encoded(&fetch, version)).map(drop),
                Ok(()),
                "v{version}"
            );
        }
        let create = CreateTopicsRequest::default().with_topics(vec![
            CreatableTopic::default()
                .with_assignments(vec![
                    CreatableReplicaAssignment::default().with_broker_ids(vec![1.into(), 2.into()]),
                ])
                .with_configs(vec![CreatableTopicConfig::default(); 2]),
        ]);
        for version in 2..=7 {
            assert_eq!(
                check(ApiKey::CreateTopics, version, &encoded(&create, version)).map(drop),
                Ok(()),
                "v{version}"
            );
        }
    }
}
