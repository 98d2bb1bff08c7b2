"""What is too much for one change of the metadata is refused or made in parts; meanwhile records are acknowledged as ever."""

import struct
import threading
import time

import pytest
from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import (
    AdminClient,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourceType,
)

from test_bad_input import answer, connect, request

CONFIG_VALUE_MAX = 32_767
INVALID_CONFIG = 40
SET, DELETE = 0, 1
RECORDS_MAX = 10_000


class Probe:
    """One record after the other, and how long the slowest took."""

    def __init__(self, bootstrap, topic):
        self.producer = Producer({"bootstrap.servers": bootstrap, "acks": "all", "linger.ms": 0})
        self.topic, self.slowest, self.errors, self.count = topic, 0.0, [], 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while not self.stop.is_set():
            done = []
            began = time.monotonic()
            self.producer.produce(self.topic, b"x", on_delivery=lambda e, m: done.append(e))
            while not done:
                self.producer.poll(0.01)
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.errors += [e for e in done if e]
            self.count += 1
            time.sleep(0.01)

    def finish(self):
        self.stop.set()
        self.thread.join()
        assert self.count > 10 and not self.errors
        return self.slowest


def refusal(future):
    with pytest.raises(KafkaException) as refused:
        future.result(30)
    return refused.value.args[0]


def uvarint(n):
    out = bytearray()
    while n >= 0x80:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes(out) + bytes([n])


def compact(text):
    return b"\0" if text is None else uvarint(len(text) + 1) + text.encode()


def alter(broker, name, operation, value):
    """IncrementalAlterConfigs 1 of one entry of topic `t`: clients do not send strings that are too long for older versions."""
    entry = compact(name) + struct.pack(">b", operation) + compact(value) + b"\0"
    resource = struct.pack(">b", 2) + compact("t") + b"\2" + entry + b"\0"
    try:
        with connect(broker) as connection:
            connection.sendall(request(44, 1, b"\0" + b"\2" + resource + b"\0" + b"\0"))
            got = answer(connection)
    except (ConnectionError, BrokenPipeError):
        # A string that no answer could carry is no request either.
        return INVALID_CONFIG, f"longer than {CONFIG_VALUE_MAX}"
    # Correlation id, tags, throttle time, one result.
    code = struct.unpack(">h", got[10:12])[0]
    return code, got[12:].decode(errors="replace")


def test_long_configuration_values_are_refused(broker):
    admin = AdminClient({"bootstrap.servers": broker.bootstrap})
    admin.create_topics([NewTopic("t", 1, 1)])["t"].result(10)

    # A list, which is kept as it comes; of numbers only what they say is kept.
    setting = "leader.replication.throttled.replicas"

    def kept():
        resource = ConfigResource(ResourceType.TOPIC, "t")
        return admin.describe_configs([resource])[resource].result(10)[setting].value

    longest = "0:1," * (CONFIG_VALUE_MAX // 4) + "0:1"
    assert len(longest) == CONFIG_VALUE_MAX
    assert alter(broker, setting, SET, longest)[0] == 0
    assert kept() == longest
    for value in ["0" + longest, "0" * 5_000_000 + "1"]:
        code, message = alter(broker, setting, SET, value)
        assert code == INVALID_CONFIG and str(CONFIG_VALUE_MAX) in message and len(message) < 1_000
    assert kept() == longest
    # A name that nothing is set of leaves nothing behind.
    assert alter(broker, "x" * 20_000, DELETE, None)[0] == 0
    assert alter(broker, setting, DELETE, None)[0] == 0
    assert kept() != longest


def test_many_partitions_at_once_stop_nobody(make_cluster):
    cluster = make_cluster()
    admin = cluster.admin()
    cluster.create("probe", 3)
    probe = Probe(cluster.bootstrap, "probe")
    time.sleep(1)
    error = refusal(admin.create_topics([NewTopic("huge", 60_000, 3)], request_timeout=30)["huge"])
    assert error.name() == "POLICY_VIOLATION" and str(RECORDS_MAX) in error.str()
    # Together they are too much for one change; each has a result of its own.
    topics = [NewTopic(f"large{n}", 6_000, 3) for n in range(2)] + [NewTopic("large0x", 60_000, 3), NewTopic("last", 3, 3)]
    made = dict(admin.create_topics(topics, request_timeout=60))
    assert refusal(made.pop("large0x")).name() == "POLICY_VIOLATION"
    for future in made.values():
        future.result(60)
    error = refusal(admin.create_partitions([NewPartitions("last", 20_000)])["last"])
    assert error.name() == "POLICY_VIOLATION"
    cluster.wait("all topics", lambda: {"large0", "large1", "last"} <= set(admin.list_topics(timeout=20).topics))
    time.sleep(1)
    assert probe.finish() < 5

    # Each of its partitions is changed for its death: more than one change takes.
    dead = cluster.node(3)
    dead.kill()

    def is_out():
        topics = admin.list_topics(timeout=20).topics
        partitions = [p for name in ["large0", "large1"] for p in topics[name].partitions.values()]
        assert len(partitions) == 12_000
        return all(p.leader not in (3, -1) and 3 not in p.isrs for p in partitions)

    cluster.wait("others lead", is_out, timeout=30)
