//! Versions that Kafka serves and the `kafka-protocol` crate does not know yet, each the version below with one difference:
//!
//! - ListOffsets 11 has another timestamp to ask for (KIP-1023) and the same bytes.
//! - OffsetCommit and OffsetFetch 10 name topics by id (KIP-848). Here an id stands where the name would, as text
//!   ([`id_as_name`]), in what handlers are given and in what they answer.
//! - DescribeLogDirs 5 says of each folder whether it is cordoned (KIP-1066); none is.
//!
//! Source: Kafka's message definitions.

use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut};
use kafka_protocol::messages::ApiKey;
use uuid::Uuid;

use super::shape;

/// The version whose bytes the crate reads and writes in place of `version`.
#[must_use]
pub fn known(api: ApiKey, version: i16) -> i16 {
    match (api, version) {
        (ApiKey::ListOffsets, 11) => 10,
        (ApiKey::OffsetCommit | ApiKey::OffsetFetch, 10) => 9,
        (ApiKey::DescribeLogDirs, 5) => 4,
        _ => version,
    }
}

/// A topic's id where a name is expected.
#[must_use]
pub fn id_as_name(id: Uuid) -> String {
    id.simple().to_string()
}

/// The id that [`id_as_name`] wrote; `None` for anything else.
#[must_use]
pub fn name_as_id(name: &str) -> Option<Uuid> {
    (name.len() == 32).then(|| Uuid::try_parse(name).ok()).flatten()
}

/// The body of a request in its [`known`] version; `topics` are the places of topic ids that [`shape::check`] found.
#[must_use]
pub fn request(body: Bytes, topics: &[Range<usize>]) -> Bytes {
    if topics.is_empty() {
        return body;
    }
    let mut out = BytesMut::with_capacity(body.len() * 2);
    let mut done = 0;
    for at in topics {
        out.extend_from_slice(&body[done..at.start]);
        let id = body[at.clone()]
            .try_into()
            .expect("an id has 16 bytes: its shape was checked");
        let name = id_as_name(Uuid::from_bytes(id));
        // A compact string: its length and one.
        out.put_u8(u8::try_from(name.len() + 1).expect("an id as a name is shorter than 127 bytes"));
        out.extend_from_slice(name.as_bytes());
        done = at.end;
    }
    out.extend_from_slice(&body[done..]);
    out.freeze()
}

/// The body of a response in `version` from that in its [`known`] version.
///
/// # Panics
/// If a handler answered with a topic that is no id: its bug.
#[must_use]
pub fn response(api: ApiKey, version: i16, body: &[u8]) -> BytesMut {
    let mut out = BytesMut::with_capacity(body.len() + 1);
    let places = || shape::response_places(api, body).expect("our own response has its shape");
    match (api, version) {
        (ApiKey::OffsetCommit | ApiKey::OffsetFetch, 10) => {
            let mut done = 0;
            for at in places() {
                out.extend_from_slice(&body[done..at.start]);
                let name = std::str::from_utf8(&body[at.start + 1..at.end])
                    .ok()
                    .and_then(name_as_id);
                out.extend_from_slice(name.expect("a handler answers with the ids it was given").as_bytes());
                done = at.end;
            }
            out.extend_from_slice(&body[done..]);
        }
        (ApiKey::DescribeLogDirs, 5) => {
            let mut done = 0;
            for end in places() {
                out.extend_from_slice(&body[done..end.start]);
                out.put_u8(0);
                done = end.start;
            }
            out.extend_from_slice(&body[done..]);
        }
        _ => out.extend_from_slice(body),
    }
    out
}

#[cfg(test)]
mod tests {
    use kafka_protocol::{
        messages::{
            DescribeLogDirsResponse, OffsetCommitRequest, OffsetFetchResponse, TopicName,
            describe_log_dirs_response::{DescribeLogDirsPartition, DescribeLogDirsResult, DescribeLogDirsTopic},
            offset_commit_request::{OffsetCommitRequestPartition, OffsetCommitRequestTopic},
            offset_fetch_response::{
                OffsetFetchResponseGroup, OffsetFetchResponsePartitions, OffsetFetchResponseTopics,
            },
        },
        protocol::{Decodable, Encodable, StrBytes},
    };

    use super::{super::shape::ShapeError, *};

    fn checked(body: Bytes) -> Result<Bytes, ShapeError> {
        let topics = shape::check(ApiKey::OffsetCommit, 10, &body)?.topics;
        Ok(request(body, &topics))
    }

    fn name(id: Uuid) -> TopicName {
        TopicName(StrBytes::from_string(id_as_name(id)))
    }

    #[test]
    fn topic_ids_become_names_and_names_become_ids() {
        let ids = [Uuid::from_u128(7), Uuid::from_u128(u128::MAX)];
        let commit = OffsetCommitRequest::default()
            .with_group_id(StrBytes::from_static_str("group").into())
            .with_topics(
                ids.map(|id| {
                    OffsetCommitRequestTopic::default()
                        .with_name(name(id))
                        .with_partitions(vec![OffsetCommitRequestPartition::default(); 2])
                })
                .to_vec(),
            );
        let mut old = BytesMut::new();
        commit.encode(&mut old, 9).expect("encodes");
        // As a client writes it: ids in place of the compact names.
        let mut new = old.to_vec();
        for id in ids {
            let text = id_as_name(id);
            let at = new.windows(32).position(|w| w == text.as_bytes()).expect("it is there");
            new.splice(at - 1..at + 32, *id.as_bytes());
        }
        let back = checked(Bytes::from(new.clone())).expect("it has its shape");
        assert_eq!(
            OffsetCommitRequest::decode(&mut back.clone(), 9).expect("decodes"),
            commit
        );
        for len in 0..new.len() {
            assert!(checked(Bytes::copy_from_slice(&new[..len])).is_err());
        }

        let fetched = OffsetFetchResponse::default().with_groups(vec![
            OffsetFetchResponseGroup::default()
                .with_group_id(StrBytes::from_static_str("group").into())
                .with_topics(vec![
                    OffsetFetchResponseTopics::default()
                        .with_name(name(ids[0]))
                        .with_partitions(vec![OffsetFetchResponsePartitions::default(); 3]),
                ]),
        ]);
        let mut old = BytesMut::new();
        fetched.encode(&mut old, 9).expect("encodes");
        let new = response(ApiKey::OffsetFetch, 10, &old);
        assert_eq!(new.len(), old.len() - 33 + 16);
        assert!(new.windows(16).any(|w| w == ids[0].as_bytes()));
    }

    #[test]
    fn every_folder_says_that_it_is_not_cordoned() {
        let topic = DescribeLogDirsTopic::default().with_partitions(vec![DescribeLogDirsPartition::default(); 2]);
        let empty = DescribeLogDirsResult::default().with_log_dir(StrBytes::from_static_str("/data"));
        let full = empty.clone().with_topics(vec![topic]);
        for dirs in [vec![], vec![empty.clone()], vec![full.clone(), empty, full]] {
            let count = dirs.len();
            let mut old = BytesMut::new();
            let described = DescribeLogDirsResponse::default().with_results(dirs);
            described.encode(&mut old, 4).expect("encodes");
            let new = response(ApiKey::DescribeLogDirs, 5, &old);
            assert_eq!(new.len(), old.len() + count);
            // A folder ends with its room, this, and its tags; the response with its tags.
            let end = [&[0xff; 16][..], &[0, 0]].concat();
            assert_eq!(new.windows(18).filter(|w| *w == end).count(), count);
        }
    }

    #[test]
    fn only_ids_are_ids() {
        assert_eq!(name_as_id("orders"), None);
        assert_eq!(name_as_id(&id_as_name(Uuid::from_u128(5))), Some(Uuid::from_u128(5)));
    }
}
