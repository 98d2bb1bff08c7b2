"""Topic settings are read as Kafka reads them, so that definitions of topics made for Kafka are taken as they are."""

import time
import uuid

import pytest
from confluent_kafka import KafkaException, Producer, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    OffsetSpec,
    ResourceType,
)
from conftest import Broker
from kafka.admin import KafkaAdminClient


@pytest.fixture(scope="module")
def broker():
    broker = Broker({"cores": "1", "log.retention.check.interval.ms": "1000"}).start()
    yield broker
    assert broker.stop() == 0, broker.log_text()
    broker.cleanup()


@pytest.fixture
def admin(broker):
    return AdminClient({"bootstrap.servers": broker.bootstrap})


def create(admin, **config):
    topic = f"t-{uuid.uuid4()}"
    config = {name.replace("_", "."): value for name, value in config.items()}
    admin.create_topics([NewTopic(topic, 1, 1, config=config)])[topic].result(10)
    return topic


def described(admin, topic):
    (entries,) = admin.describe_configs([ConfigResource(ResourceType.TOPIC, topic)]).values()
    return {name: entry.value for name, entry in entries.result(10).items()}


def change(admin, topic, name, value, operation):
    entry = ConfigEntry(name, value, incremental_operation=operation)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
    admin.incremental_alter_configs([resource])[resource].result(10)


def produce(broker, topic, values):
    producer = Producer({"bootstrap.servers": broker.bootstrap, "linger.ms": 0, "batch.num.messages": 1})
    for value in values:
        producer.produce(topic, value)
        assert producer.flush(10) == 0


def earliest(admin, topic):
    asked = admin.list_offsets({TopicPartition(topic, 0): OffsetSpec.earliest()})
    return list(asked.values())[0].result(10).offset


def test_all_settings_of_a_kafka_topic_are_taken(admin):
    # As a tool reads them off a topic of Kafka 4.4.0, each stated.
    defaults = {
        "errors.deadletterqueue.group.enable": "false",
        "max.decompressed.message.bytes": "2147483639",
        "remote.copy.lag.bytes": "-1",
        "remote.copy.lag.ms": "0",
        "remote.storage.enable": "false",
        "remote.log.copy.disable": "false",
        "remote.log.delete.on.disable": "false",
        "local.retention.ms": "-2",
        "local.retention.bytes": "-2",
        "compression.type": "producer",
        "compression.gzip.level": "-1",
        "compression.lz4.level": "9",
        "compression.zstd.level": "3",
        "cleanup.policy": "delete",
        "leader.replication.throttled.replicas": "",
        "follower.replication.throttled.replicas": "",
        "unclean.leader.election.enable": "false",
        "preallocate": "false",
        "delete.retention.ms": "86400000",
        "file.delete.delay.ms": "60000",
        "flush.messages": "9223372036854775807",
        "flush.ms": "9223372036854775807",
        "index.interval.bytes": "4096",
        "max.compaction.lag.ms": "9223372036854775807",
        "max.message.bytes": "1048588",
        "message.timestamp.after.max.ms": "3600000",
        "message.timestamp.before.max.ms": "9223372036854775807",
        "message.timestamp.type": "CreateTime",
        "min.cleanable.dirty.ratio": "0.5",
        "min.compaction.lag.ms": "0",
        "min.insync.replicas": "1",
        "retention.bytes": "-1",
        "retention.ms": "604800000",
        "segment.bytes": "1073741824",
        "segment.index.bytes": "10485760",
        "segment.jitter.ms": "0",
        "segment.ms": "604800000",
    }
    topic = create(admin, **defaults)
    told = described(admin, topic)
    assert {name: told[name] for name in defaults} == defaults


def test_values_are_kept_in_one_form(broker, admin):
    topic = create(
        admin,
        unclean_leader_election_enable="True",
        preallocate=" FALSE ",
        retention_ms=" +90000 ",
        cleanup_policy="delete, delete",
        leader_replication_throttled_replicas="0:1, 1:2",
    )
    told = described(admin, topic)
    assert told["unclean.leader.election.enable"] == "true"
    assert told["preallocate"] == "false"
    assert told["retention.ms"] == "90000"
    assert told["cleanup.policy"] == "delete"
    assert told["leader.replication.throttled.replicas"] == "0:1,1:2"
    change(admin, topic, "segment.ms", " 60000\t", AlterConfigOpType.SET)
    assert described(admin, topic)["segment.ms"] == "60000"
    # Whoever acts on them reads them.
    produce(broker, topic, [b"x"])


@pytest.mark.parametrize("name, value, why", [
    ("preallocate", "yes", "true or false"),
    ("compression.gzip.level", "0", "between 1 and 9 or equal to -1"),
    ("compression.lz4.level", "18", "between 1 and 17"),
    ("compression.zstd.level", "23", "between -131072 and 22"),
    ("cleanup.policy", "delete,", "must not be empty"),
    ("cleanup.policy", "delete,compact", "compaction"),
    ("cleanup.policy", "remove", "one of: compact, delete"),
    ("remote.storage.enable", "TRUE", "[Tt]iered storage"),
    ("local.retention.ms", "-3", "between -2"),
    ("leader.replication.throttled.replicas", "x", "partitionId"),
    ("follower.replication.throttled.replicas", "*,0:1", "partitionId"),
])
def test_what_cannot_be_is_refused_with_a_reason(admin, name, value, why):
    with pytest.raises(KafkaException, match=why) as refused:
        create(admin, **{name: value})
    assert refused.value.args[0].name() == "INVALID_CONFIG"


def test_lists_are_added_to_and_taken_from(admin):
    topic = create(admin)
    throttled = "leader.replication.throttled.replicas"
    change(admin, topic, throttled, "0:1,1:2", AlterConfigOpType.APPEND)
    change(admin, topic, throttled, "2:3", AlterConfigOpType.APPEND)
    assert described(admin, topic)[throttled] == "0:1,1:2,2:3"
    change(admin, topic, throttled, "1:2", AlterConfigOpType.SUBTRACT)
    assert described(admin, topic)[throttled] == "0:1,2:3"
    with pytest.raises(KafkaException, match="INVALID_CONFIG"):
        change(admin, topic, "retention.ms", "5", AlterConfigOpType.APPEND)


def test_a_topic_without_a_cleanup_policy_keeps_all(broker, admin):
    short = dict(segment_bytes="16384", retention_bytes="0", retention_ms="1000")
    kept, cut = create(admin, cleanup_policy="", **short), create(admin, **short)
    assert described(admin, kept)["cleanup.policy"] == ""
    for topic in (kept, cut):
        produce(broker, topic, [bytes(10_000)] * 4)
    until = time.monotonic() + 20
    while earliest(admin, cut) == 0:
        assert time.monotonic() < until, "retention does nothing"
        time.sleep(0.2)
    time.sleep(1.5)
    assert earliest(admin, kept) == 0
    change(admin, kept, "cleanup.policy", "delete", AlterConfigOpType.APPEND)
    while earliest(admin, kept) == 0:
        assert time.monotonic() < until, "retention does nothing after the change"
        time.sleep(0.2)


def test_levels_of_compression_are_acted_on(broker, admin):
    text = b"".join(b"%d," % (n % 977 * (n % 13)) for n in range(60_000))
    sizes = {}
    for codec, levels in {"gzip": ("1", "9"), "lz4": ("9", "12"), "zstd": ("-100", "19")}.items():
        for level in levels:
            topic = create(admin, **{"compression.type": codec, f"compression.{codec}.level": level})
            produce(broker, topic, [text])
            sizes[codec, level] = stored(broker, topic)
        assert sizes[codec, levels[0]] > 1.05 * sizes[codec, levels[1]], sizes


def test_what_a_batch_unpacks_to_is_bounded_by_the_topic(broker, admin):
    topic = create(admin, max_decompressed_message_bytes="20000")
    producer = Producer({"bootstrap.servers": broker.bootstrap, "linger.ms": 0, "compression.type": "zstd"})
    told = []
    for size in (15_000, 25_000):
        producer.produce(topic, bytes(size), on_delivery=lambda error, _: told.append(error))
        assert producer.flush(10) == 0
    assert told[0] is None and told[1].name() == "INVALID_RECORD", told


def stored(broker, topic):
    """Bytes of its log."""
    client = KafkaAdminClient(bootstrap_servers=broker.bootstrap)
    try:
        topics = [t for b in client.describe_log_dirs() for folder in b["log_dirs"] for t in folder["topics"]]
    finally:
        client.close()
    return sum(p["partition_size"] for t in topics if t["name"] == topic for p in t["partitions"])
