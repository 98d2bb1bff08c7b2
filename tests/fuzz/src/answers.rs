//! Encoders of answers, fed with any text of any length: an answer is written whole, or refused. A client can have its own
//! words put into an answer (names, ids, configuration values), in a version that holds less of them than it was asked in.

use bytes::{Buf, Bytes};
use kafka_protocol::{
    messages::{
        AlterConfigsResponse, ApiKey, BrokerId, CreateTopicsResponse, DescribeConfigsResponse, DescribeGroupsResponse,
        FindCoordinatorResponse, GroupId, JoinGroupResponse, ListGroupsResponse, MetadataResponse, OffsetFetchResponse,
        TopicName,
        alter_configs_response::AlterConfigsResourceResponse,
        create_topics_response::CreatableTopicResult,
        describe_configs_response::{DescribeConfigsResourceResult, DescribeConfigsResult},
        describe_groups_response::DescribedGroup,
        join_group_response::JoinGroupResponseMember,
        list_groups_response::ListedGroup,
        metadata_response::{MetadataResponseBroker, MetadataResponseTopic},
        offset_fetch_response::{OffsetFetchResponsePartition, OffsetFetchResponseTopic},
    },
    protocol::{Decodable, Encodable, HeaderVersion, StrBytes},
};
use millrace_net::kafka::{codec, versions};

/// The first byte says how often the rest is repeated, the second into how many elements it goes.
pub fn run(data: &[u8]) {
    let [repeats, elements, text @ ..] = data else { return };
    let text = String::from_utf8_lossy(text).repeat(usize::from(*repeats));
    let text = StrBytes::from_string(text);
    let many = usize::from(*elements % 8);
    let name = || TopicName(text.clone());

    let created = CreatableTopicResult::default()
        .with_name(name())
        .with_error_message(Some(text.clone()));
    whole(
        ApiKey::CreateTopics,
        &CreateTopicsResponse::default().with_topics(vec![created; many]),
    );

    let altered = AlterConfigsResourceResponse::default()
        .with_resource_name(text.clone())
        .with_error_message(Some(text.clone()));
    whole(
        ApiKey::AlterConfigs,
        &AlterConfigsResponse::default().with_responses(vec![altered; many]),
    );

    let entry = DescribeConfigsResourceResult::default()
        .with_name(text.clone())
        .with_value(Some(text.clone()));
    let described = DescribeConfigsResult::default()
        .with_resource_name(text.clone())
        .with_configs(vec![entry; many]);
    whole(
        ApiKey::DescribeConfigs,
        &DescribeConfigsResponse::default().with_results(vec![described; many]),
    );

    let member = JoinGroupResponseMember::default()
        .with_member_id(text.clone())
        .with_metadata(Bytes::from(text.to_string()));
    let joined = JoinGroupResponse::default()
        .with_protocol_name(Some(text.clone()))
        .with_member_id(text.clone())
        .with_members(vec![member; many]);
    whole(ApiKey::JoinGroup, &joined);

    let listed = ListedGroup::default().with_group_id(GroupId(text.clone()));
    whole(
        ApiKey::ListGroups,
        &ListGroupsResponse::default().with_groups(vec![listed; many]),
    );
    let group = DescribedGroup::default().with_group_id(GroupId(text.clone()));
    whole(
        ApiKey::DescribeGroups,
        &DescribeGroupsResponse::default().with_groups(vec![group; many]),
    );
    whole(
        ApiKey::FindCoordinator,
        &FindCoordinatorResponse::default().with_host(text.clone()),
    );

    let broker = MetadataResponseBroker::default()
        .with_node_id(BrokerId(1))
        .with_host(text.clone());
    let topic = MetadataResponseTopic::default().with_name(Some(name()));
    let metadata = MetadataResponse::default()
        .with_brokers(vec![broker; many])
        .with_topics(vec![topic; many]);
    whole(ApiKey::Metadata, &metadata);

    let partition = OffsetFetchResponsePartition::default().with_metadata(Some(text.clone()));
    let topic = OffsetFetchResponseTopic::default()
        .with_name(name())
        .with_partitions(vec![partition; many]);
    whole(
        ApiKey::OffsetFetch,
        &OffsetFetchResponse::default().with_topics(vec![topic; many]),
    );
}

/// Encodes an answer in every version served: what is written is framed, and its client reads it.
fn whole<R: Encodable + Decodable + HeaderVersion>(api: ApiKey, answer: &R) {
    let served = versions::find(api as i16).expect("it is served");
    for version in served.min..=served.max {
        // A version that lacks a field refuses an answer with it: the handlers leave it out.
        let Ok(frame) = codec::encode(api, answer, version, 7) else {
            continue;
        };
        let mut bytes = frame.freeze();
        let length = bytes.get_i32();
        assert_eq!(usize::try_from(length), Ok(bytes.len()), "{api:?} {version}");
        if codec_knows(api, version) {
            kafka_protocol::messages::ResponseHeader::decode(&mut bytes, R::header_version(version)).expect("a header");
            R::decode(&mut bytes, version).unwrap_or_else(|e| panic!("{api:?} {version}: {e}"));
            assert!(!bytes.has_remaining(), "{api:?} {version}: more than the answer");
        }
    }
}

/// Whether the protocol crate can read this version back.
fn codec_knows(api: ApiKey, version: i16) -> bool {
    api.valid_versions().max >= version
}

/// Texts below, at and beyond what a string of the older versions can say.
pub fn seeds() -> Vec<Vec<u8>> {
    let of = |repeats: u8, elements: u8, len: usize| [&[repeats, elements][..], &vec![b't'; len]].concat();
    vec![
        of(1, 1, 0),
        of(1, 2, 249),
        of(1, 1, 32_767),
        of(1, 1, 32_768),
        of(4, 3, 16_384),
    ]
}
