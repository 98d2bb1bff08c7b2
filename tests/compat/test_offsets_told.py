"""What clients are told of a log's offsets and epochs holds."""

import struct
import time

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec
from test_bad_input import answer, connect, request


def produce(broker, topic, *timestamps, **settings):
    """A batch for each timestamp."""
    producer = Producer({"bootstrap.servers": broker.bootstrap, **settings})
    for timestamp in timestamps:
        producer.produce(topic, b"x", partition=0, timestamp=timestamp)
        assert producer.flush(20) == 0


def newest(admin, topic):
    partition = TopicPartition(topic, 0)
    told = admin.list_offsets({partition: OffsetSpec.max_timestamp()})[partition].result(10)
    return told.offset, told.timestamp


def delete_before(admin, topic, offset):
    partition = TopicPartition(topic, 0, offset)
    assert admin.delete_records([partition])[partition].result(10).low_watermark == offset


def test_the_largest_timestamp_is_one_of_a_record_that_is_left(broker):
    admin = AdminClient({"bootstrap.servers": broker.bootstrap})
    admin.create_topics([NewTopic("newest", 1)])["newest"].result(10)
    now = int(time.time() * 1000)
    assert newest(admin, "newest") == (-1, -1)
    produce(broker, "newest", now + 500, now + 50, now + 60, now + 60)
    assert newest(admin, "newest") == (0, now + 500)
    delete_before(admin, "newest", 1)
    assert newest(admin, "newest") == (2, now + 60)
    delete_before(admin, "newest", 4)
    assert newest(admin, "newest") == (-1, -1)
    # The log start inside a batch: only its later records count.
    producer = Producer({"bootstrap.servers": broker.bootstrap, "linger.ms": 200, "compression.type": "lz4"})
    for timestamp in (now + 900, now + 700, now + 800):
        producer.produce("newest", b"x" * 100, partition=0, timestamp=timestamp)
    assert producer.flush(20) == 0
    assert newest(admin, "newest") == (4, now + 900)
    delete_before(admin, "newest", 5)
    assert newest(admin, "newest") == (6, now + 800)


def test_an_idempotent_producer_goes_on_when_its_topic_was_made_anew(broker):
    admin = AdminClient({"bootstrap.servers": broker.bootstrap})

    def make():
        admin.create_topics([NewTopic("anew", 1)])["anew"].result(10)

    make()
    producer = Producer({"bootstrap.servers": broker.bootstrap, "enable.idempotence": True})
    for _ in range(5):
        producer.produce("anew", b"x", partition=0)
        assert producer.flush(20) == 0
    admin.delete_topics(["anew"])["anew"].result(10)
    time.sleep(0.5)
    make()
    begun = time.monotonic()
    producer.produce("anew", b"y", partition=0)
    assert producer.flush(20) == 0
    assert time.monotonic() - begun < 4, "no predecessor of a new partition's leader has anything to hand over"


def end_of_epoch(broker, topic, epoch):
    """OffsetForLeaderEpoch 3 of partition 0: error, epoch and end offset."""
    name = struct.pack(">h", len(topic)) + topic.encode()
    with connect(broker) as connection:
        connection.sendall(request(23, 3, struct.pack(">ii", -1, 1) + name + struct.pack(">iiii", 1, 0, -1, epoch)))
        told = answer(connection)
    error, _, epoch, end = struct.unpack(">hiiq", told[-18:])
    return error, epoch, end


def test_an_epoch_ends_at_the_log_end_and_deleted_ones_before_what_is_left(make_broker):
    broker = make_broker()
    admin = AdminClient({"bootstrap.servers": broker.bootstrap})
    admin.create_topics([NewTopic("t", 1)])["t"].result(10)
    now = int(time.time() * 1000)
    produce(broker, "t", now, now, now)
    _, first, end = end_of_epoch(broker, "t", 0)
    assert (first, end) == (0, 3)
    broker.kill()
    broker.start()
    # Every start of a broker is another leader epoch.
    produce(broker, "t", now, now)
    assert end_of_epoch(broker, "t", 0) == (0, 0, 3)
    assert end_of_epoch(broker, "t", 1) == (0, 1, 5)
    assert end_of_epoch(broker, "t", 9) == (0, -1, -1)
    # Nothing of the first epoch is left; whoever has read it all stands where it ended all the same.
    delete_before(admin, "t", 3)
    assert end_of_epoch(broker, "t", 0) == (0, 0, 3)


def log_starts(cluster):
    consumer = Consumer({"bootstrap.servers": cluster.bootstrap, "group.id": "g"})
    starts = [consumer.get_watermark_offsets(TopicPartition("t", p), timeout=30)[0] for p in range(3)]
    consumer.close()
    return starts


def test_deleted_records_stay_deleted_when_another_leads(make_cluster):
    cluster = make_cluster()
    cluster.create("t", partitions=3)
    producer = Producer({"bootstrap.servers": cluster.bootstrap})
    for number in range(900):
        producer.produce("t", str(number).encode(), partition=number % 3)
    assert producer.flush(20) == 0
    partitions = [TopicPartition("t", p, 200 + p) for p in range(3)]
    admin = cluster.admin()
    for partition, deleted in admin.delete_records(partitions).items():
        assert deleted.result(20).low_watermark == partition.offset
    victim = cluster.node(cluster.partitions("t")[0].leader)
    victim.kill()
    cluster.wait("another leads", lambda: all(p.leader not in (-1, victim.number) for p in cluster.partitions("t").values()))
    assert log_starts(cluster) == [200, 201, 202]
    victim.launch().wait_ready()
    cluster.wait_in_sync("t")
    # Whoever was away follows, too.
    for node in cluster.nodes:
        if node is not victim:
            node.kill()
            cluster.wait("another leads", lambda: all(p.leader not in (-1, node.number) for p in cluster.partitions("t").values()))
            assert log_starts(cluster) == [200, 201, 202]
            node.launch().wait_ready()
            cluster.wait_in_sync("t")
