"""What Fetch answers, byte by byte, where clients hide it."""

import struct
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from test_bad_input import answer, connect, request


def fetch(connection, topic, offsets, wait_ms=500, min_bytes=1, expected_error=0, partition_bytes=1 << 20):
    """One Fetch v4 without a session; bytes of records by partition."""
    name = topic.encode()
    body = struct.pack(">iiiibi", -1, wait_ms, min_bytes, 8 << 20, 0, 1) + struct.pack(">h", len(name)) + name
    body += struct.pack(">i", len(offsets))
    for partition, offset in offsets.items():
        body += struct.pack(">iqi", partition, offset, partition_bytes)
    connection.sendall(request(1, 4, body))
    got = answer(connection)
    # Correlation id, throttle time, one topic with its name.
    at = 4 + 4 + 4 + 2 + len(name)
    count, = struct.unpack_from(">i", got, at)
    at += 4
    sizes = {}
    for _ in range(count):
        partition, error, _hw, _lso, aborted, size = struct.unpack_from(">ihqqii", got, at)
        assert error == expected_error and aborted <= 0
        at += 30
        sizes[partition] = size
        at += size
    assert at == len(got)
    return sizes


@pytest.mark.parametrize("partitions", [2, 3, 4])
@pytest.mark.parametrize("step", [0, 1], ids=["as it is", "turned by the client"])
def test_partitions_with_a_backlog_take_turns(broker, partitions, step):
    """Whether a client names them in the same order each time, or turns its list itself as librdkafka does."""
    topic = "turns-" + uuid.uuid4().hex[:8]
    admin = AdminClient({"bootstrap.servers": broker.bootstrap})
    admin.create_topics([NewTopic(topic, partitions)])[topic].result(10)
    # Small batches: where two of them are half an answer each, both cores' first ones come, and the answer is larger.
    producer = Producer({"bootstrap.servers": broker.bootstrap, "batch.size": 16_384})
    for n in range(2000 * partitions):
        producer.produce(topic, bytes(1000), partition=n % partitions)
    assert producer.flush(30) == 0
    gave = set()
    with connect(broker) as connection:
        # By chance: each has at least a quarter of them to come first, and one in ten million runs fails.
        for n in range(60):
            order = [(i + n * step) % partitions for i in range(partitions)]
            sizes = fetch(connection, topic, dict.fromkeys(order, 0))
            # No answer is larger than a mebibyte, whatever was asked for.
            assert 0 < sum(sizes.values()) <= 1 << 20, sizes
            gave |= {partition for partition, size in sizes.items() if size > 0}
    assert gave == set(range(partitions)), "a partition waits for another's backlog to end"


def test_a_batch_larger_than_what_is_taken_of_a_partition_comes_from_every_core(broker):
    """The first batch of an answer does (KIP-74), wherever it is."""
    topic = "larger-" + uuid.uuid4().hex[:8]
    admin = AdminClient({"bootstrap.servers": broker.bootstrap})
    admin.create_topics([NewTopic(topic, 8)])[topic].result(10)
    producer = Producer({"bootstrap.servers": broker.bootstrap})
    for partition in range(8):
        producer.produce(topic, bytes(5000), partition=partition)
    assert producer.flush(30) == 0
    with connect(broker) as connection:
        for _ in range(4):
            for behind in range(8):
                offsets = {partition: int(partition != behind) for partition in range(8)}
                sizes = fetch(connection, topic, offsets, partition_bytes=512)
                assert [p for p, size in sizes.items() if size > 0] == [behind]


def test_what_several_cores_have_together_is_enough(broker):
    """Each of the two has less than the fetch waits for."""
    topic = "together-" + uuid.uuid4().hex[:8]
    admin = AdminClient({"bootstrap.servers": broker.bootstrap})
    admin.create_topics([NewTopic(topic, 8)])[topic].result(10)
    producer = Producer({"bootstrap.servers": broker.bootstrap, "linger.ms": 0})
    with connect(broker) as connection, ThreadPoolExecutor() as pool:
        begun = time.monotonic()
        answered = pool.submit(fetch, connection, topic, dict.fromkeys(range(8), 0), wait_ms=9_000, min_bytes=1_500)
        time.sleep(0.5)
        for partition in range(8):
            producer.produce(topic, bytes(200), partition=partition)
        assert producer.flush(10) == 0
        # 200 bytes and what a batch takes around them, eight times.
        assert 1_500 <= sum(answered.result(20).values()) < 3_000
        assert time.monotonic() - begun < 6
