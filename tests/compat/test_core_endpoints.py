"""`core.endpoints`: clients see each core as a broker of its own, and everything they do goes on working."""

import collections
import random
import socket
import subprocess
import uuid

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType

from conftest import Broker
from test_java_tools import LIB, TOOLS, run

CORES = 2


@pytest.fixture(scope="module")
def cores():
    broker = Broker(settings={"core.endpoints": "true"}, args=["--cores", str(CORES)]).start()
    yield broker
    assert broker.stop() == 0, broker.log_text()
    broker.cleanup()


@pytest.fixture(scope="module")
def topic(cores):
    name = "cores-" + uuid.uuid4().hex[:8]
    admin = AdminClient({"bootstrap.servers": cores.bootstrap})
    admin.create_topics([NewTopic(name, 6)])[name].result(30)
    return name


def test_partitions_are_led_by_the_cores(cores, topic):
    cluster = AdminClient({"bootstrap.servers": cores.bootstrap}).list_topics(timeout=10)
    assert sorted(cluster.brokers) == [0, 100_000]
    assert len({b.port for b in cluster.brokers.values()} | {cores.port}) == CORES + 1
    assert cluster.controller_id == 0
    leaders = collections.Counter(p.leader for p in cluster.topics[topic].partitions.values())
    assert leaders == {0: 3, 100_000: 3}
    for partition in cluster.topics[topic].partitions.values():
        assert partition.replicas == partition.isrs == [partition.leader]


def test_a_group_reads_what_was_sent_to_every_core(cores, topic):
    producer = Producer({"bootstrap.servers": cores.bootstrap, "enable.idempotence": True})
    sent = [f"{n}".encode() for n in range(3000)]
    for n, value in enumerate(sent):
        producer.produce(topic, value, partition=n % 6)
    assert producer.flush(30) == 0
    consumer = Consumer({"bootstrap.servers": cores.bootstrap, "group.id": "cores", "auto.offset.reset": "earliest"})
    consumer.subscribe([topic])
    got = []
    while len(got) < len(sent):
        message = consumer.poll(10)
        assert message is not None and not message.error(), message and message.error()
        got.append(message.value())
    consumer.commit(asynchronous=False)
    committed = consumer.committed([TopicPartition(topic, p) for p in range(6)], timeout=10)
    consumer.close()
    assert sorted(got) == sorted(sent)
    assert [c.offset for c in committed] == [500] * 6


def test_settings_of_a_core_are_the_nodes(cores):
    admin = AdminClient({"bootstrap.servers": cores.bootstrap})
    for broker in (0, 100_000):
        resource = ConfigResource(ResourceType.BROKER, str(broker))
        values = admin.describe_configs([resource])[resource].result(10)
        assert values["core.endpoints"].value == "true"


@pytest.mark.skipif(not LIB.is_dir(), reason="scripts/test.sh fetches the jars and names their folder")
def test_kafkas_tools_see_each_partition_once(cores, topic):
    described = run(TOOLS + "TopicCommand", "--bootstrap-server", cores.bootstrap, "--describe", "--topic", topic)
    assert described.count("Leader: 0\t") == 3 and described.count("Leader: 100000") == 3, described
    folders = run(TOOLS + "LogDirsCommand", "--bootstrap-server", cores.bootstrap, "--describe", "--topic-list", topic)
    assert folders.count(f'"partition":"{topic}-') == 6, folders
    groups = run(TOOLS + "consumer.group.ConsumerGroupCommand", "--bootstrap-server", cores.bootstrap, "--list")
    assert groups.split().count("cores") == 1, groups


def free_ports(count):
    """The first of so many free ports in a row, below those that the system gives to connections."""
    while True:
        base = random.randrange(20_000, 30_000)
        try:
            for port in range(base, base + count):
                socket.create_server(("127.0.0.1", port)).close()
            return base
        except OSError:
            continue


def test_the_ports_follow_the_first_and_one_in_use_is_named(make_broker):
    broker = make_broker(settings={"core.endpoints": "true"}, args=["--cores", str(CORES)])
    assert broker.stop() == 0
    broker.port = base = free_ports(CORES + 1)
    with socket.create_server(("127.0.0.1", base + 2)):
        # Several times: each start ends in the middle of what its shards do in the background.
        for _ in range(5):
            with pytest.raises(RuntimeError, match=f"cannot listen on 127.0.0.1:{base + 2}"):
                broker.start()
    broker.start()
    listed = subprocess.run(["kcat", "-b", broker.bootstrap, "-L"], capture_output=True, text=True, timeout=30).stdout
    assert f"broker 0 at 127.0.0.1:{base + 1}" in listed and f"broker 100000 at 127.0.0.1:{base + 2}" in listed, listed
