"""What the header of a batch states of its records is not believed: batches are opened, and retention goes by the records."""

import gzip
import os
import pathlib
import struct
import subprocess
import time

import lz4.frame
import pytest
import snappy
import zstandard
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from test_bad_input import answer, connect, crc32c, produce, request

DAY_MS = 24 * 3_600_000
CODECS = {1: gzip.compress, 2: snappy.compress, 3: lz4.frame.compress, 4: zstandard.ZstdCompressor().compress}


def zigzag(number):
    number = (number << 1) ^ (number >> 63)
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def record(offset, time_delta=0, value=b"x"):
    body = b"\0" + zigzag(time_delta) + zigzag(offset) + zigzag(-1) + zigzag(len(value)) + value + zigzag(0)
    return zigzag(len(body)) + body


def batch(records, codec=0, count=None, base_offset=0, times=(0, 0), pack=None):
    """`times`: base and largest timestamp as stated."""
    count = len(records) if count is None else count
    payload = b"".join(records)
    payload = (pack or CODECS.get(codec, bytes))(payload)
    body = struct.pack(">hiqqqhii", codec, count - 1, *times, -1, -1, -1, count) + payload
    inner = struct.pack(">ibI", -1, 2, crc32c(body)) + body
    return struct.pack(">qi", base_offset, len(inner)) + inner


def create(broker, *topics, **config):
    admin = AdminClient({"bootstrap.servers": broker.bootstrap})
    for made in admin.create_topics([NewTopic(t, 1, config=config) for t in topics]).values():
        made.result(10)


def read(broker, topic, count, seconds=10):
    consumer = Consumer({"bootstrap.servers": broker.bootstrap, "group.id": "g", "enable.auto.commit": False})
    consumer.assign([TopicPartition(topic, 0, 0)])
    found = consumer.consume(count, seconds)
    consumer.close()
    return [(m.value(), m.timestamp()) if not m.error() else m.error() for m in found]


def offset_at(broker, topic, timestamp):
    consumer = Consumer({"bootstrap.servers": broker.bootstrap, "group.id": "g"})
    found = consumer.offsets_for_times([TopicPartition(topic, 0, timestamp)], timeout=10)[0].offset
    consumer.close()
    return found


def unreadable(codec):
    two = [record(0), record(1)]
    yield "it does not unpack", batch([b"no such payload"], codec, 1, pack=bytes), 2
    yield "it is cut short", batch([record(n, value=os.urandom(100)) for n in range(9)], codec, pack=lambda b: CODECS[codec](b)[:-30]), 2
    yield "it states more records", batch(two, codec, 3), 87
    yield "it states fewer records", batch(two, codec, 1), 87
    yield "its offsets have a hole", batch([record(0), record(5)], codec, 2), 87
    yield "a record is cut short", batch([record(0), record(1)[:-1]], codec, 2), 87
    yield "it does not begin at 0", batch(two, codec, base_offset=7), 87


@pytest.mark.parametrize("codec", [1, 2, 3, 4])
def test_what_nobody_could_read_is_refused(broker, codec):
    topic = f"unreadable-{codec}"
    create(broker, topic)
    with connect(broker) as connection:
        assert produce(connection, topic.encode(), (0, batch([record(0, value=b"first")], codec))) == [0]
        for what, bad, error in unreadable(codec):
            # Where in it a codec's own checks find the damage is the codec's affair.
            assert produce(connection, topic.encode(), (0, bad))[0] in {error, 2}, what
        assert produce(connection, topic.encode(), (0, batch([record(0, value=b"last")], codec))) == [0]
    assert [value for value, _ in read(broker, topic, 2)] == [b"first", b"last"]


def compact(data):
    return bytes([len(data) + 1]) + data


def test_records_with_times_out_of_range_are_named(broker):
    create(broker, "named")
    now = int(time.time() * 1000)
    for codec in [0, 3]:
        records = [record(0), record(1, 2 * DAY_MS), record(2), record(3, 3 * DAY_MS)]
        sent = batch(records, codec, times=(now, now))
        # Produce 9.
        body = b"\0" + struct.pack(">hi", -1, 5000) + b"\2" + compact(b"named") + b"\2"
        body += struct.pack(">i", 0) + zigzag_free_length(len(sent)) + sent + b"\0\0\0"
        head = struct.pack(">hhih", 0, 9, 7, -1) + b"\0"
        with connect(broker) as connection:
            connection.sendall(struct.pack(">i", len(head + body)) + head + body)
            told = answer(connection)
        at = told.index(compact(b"named")) + len(compact(b"named")) + 1
        index, error = struct.unpack(">ih", told[at : at + 6])
        assert (index, error) == (0, 32)
        at += 6 + 24
        assert told[at] == 3, "two records"
        first = struct.unpack(">i", told[at + 1 : at + 5])[0]
        at += 5 + told[at + 5] + 1
        second = struct.unpack(">i", told[at : at + 4])[0]
        assert (first, second) == (1, 3)


def zigzag_free_length(length):
    """An unsigned varint of one more, as compact lengths are."""
    length += 1
    out = b""
    while length > 0x7F:
        out += bytes([length & 0x7F | 0x80])
        length >>= 7
    return out + bytes([length])


def test_records_are_kept_for_as_long_as_retention_says_whatever_headers_state(make_broker):
    broker = make_broker(settings={"log.retention.check.interval.ms": 1000})
    now = int(time.time() * 1000)
    kept = {
        "no-time": batch([record(0)], times=(-1, -1)),
        "no-time-lz4": batch([record(0)], 3, times=(-1, -1)),
        "max-unknown": batch([record(0), record(1, 5)], 1, times=(now, -1)),
        "max-zero": batch([record(0), record(1, 5)], 1, times=(now, 0)),
        "max-zero-plain": batch([record(0), record(1, 5)], times=(now, 0)),
    }
    gone = {
        "old": batch([record(0)], 3, times=(now - 30 * DAY_MS, now)),
        "told-too-late": batch([record(0)], times=(now - 30 * DAY_MS, now)),
    }
    create(broker, *kept, *gone)
    with connect(broker) as connection:
        for topic, sent in {**kept, **gone}.items():
            assert produce(connection, topic.encode(), (0, sent)) == [0], topic
    codecs = ["gzip", "snappy", "lz4", "zstd"]
    if (go := os.environ.get("MILLRACE_TEST_GO")) is not None:
        create(broker, *codecs)
        for codec in codecs:
            subprocess.run([pathlib.Path(go) / "old-sarama", broker.bootstrap, codec, codec, "10"], check=True, timeout=30)
    begun = time.monotonic()
    watching = Consumer({"bootstrap.servers": broker.bootstrap, "group.id": "g"})

    def start(topic):
        return watching.get_watermark_offsets(TopicPartition(topic, 0), timeout=10)[0]

    while {start(topic) for topic in gone} != {1}:
        assert time.monotonic() - begun < 20, "what is older than a week goes"
        time.sleep(0.2)
    time.sleep(1.5)
    assert {topic: start(topic) for topic in kept} == dict.fromkeys(kept, 0)
    for topic in ["max-unknown", "max-zero", "max-zero-plain"]:
        assert offset_at(broker, topic, now + 5) == 1
    if go is not None:
        assert {codec: start(codec) for codec in codecs} == dict.fromkeys(codecs, 0)
        assert {codec: offset_at(broker, codec, now) for codec in codecs} == dict.fromkeys(codecs, 0)
    watching.close()


def test_the_largest_timestamp_is_stated_as_the_records_have_it(broker):
    create(broker, "stated")
    now = int(time.time() * 1000)
    with connect(broker) as connection:
        for codec in [0, 1, 2, 3, 4]:
            sent = batch([record(0), record(1, 40), record(2, 7)], codec, times=(now, 0))
            assert produce(connection, b"stated", (0, sent)) == [0]
        # Fetch 4 from offset 0.
        body = struct.pack(">iiiibi", -1, 100, 1, 1 << 20, 0, 1) + struct.pack(">h", 6) + b"stated"
        connection.sendall(request(1, 4, body + struct.pack(">iiqi", 1, 0, 0, 1 << 20)))
        told = answer(connection)
    records = told[told.index(b"stated") + 6 + 4 + 4 + 2 + 8 + 8 + 4 + 4 :]
    stated = []
    while records:
        length = 12 + struct.unpack(">i", records[8:12])[0]
        stated.append(struct.unpack(">q", records[35:43])[0])
        assert struct.unpack(">I", records[17:21])[0] == crc32c(records[21:length])
        records = records[length:]
    assert stated == [now + 40] * 5


def test_what_is_packed_anew_is_held_to_the_topics_limit(make_broker):
    broker = make_broker()
    create(broker, "plain", **{"compression.type": "uncompressed"})
    packed = batch([record(0, value=b"\0" * 8_000_000)], 4)
    assert len(packed) < 10_000
    small = batch([record(0, value=b"\0" * 500_000)], 4)
    with connect(broker) as connection:
        assert produce(connection, b"plain", (0, packed)) == [10]
        assert produce(connection, b"plain", (0, small)) == [0]
    assert [len(value) for value, _ in read(broker, "plain", 1)] == [500_000]


@pytest.mark.parametrize("codec", [1, 2, 3, 4])
def test_a_compression_bomb_is_refused(make_broker, codec):
    broker = make_broker(settings={"decompress.max.bytes": 1 << 20, "message.max.bytes": 10_000_000})
    create(broker, "bomb")
    create(broker, "repacked", **{"compression.type": "zstd" if codec != 4 else "lz4"})
    bomb = batch([record(0, value=b"\0" * (64 << 20))], codec)
    with connect(broker) as connection:
        for topic in [b"bomb", b"repacked"]:
            # INVALID_RECORD, as Kafka 4.4 answers; CORRUPT_MESSAGE would have clients send it again.
            assert produce(connection, topic, (0, bomb)) == [87]
    assert broker.rss_mib() < 200


def test_a_batch_that_takes_long_to_open_does_not_hold_up_others_nor_is_overtaken(make_broker):
    broker = make_broker(settings={"cores": 1})
    create(broker, "long", "other")
    large = batch([record(n, value=b"\0" * 1_000_000) for n in range(100)], 4)
    assert len(large) < 100_000
    slowest, producer = 0.0, Producer({"bootstrap.servers": broker.bootstrap, "linger.ms": 0})
    with connect(broker) as connection:
        # Two requests on their way at once: the second is opened sooner.
        def send(sent):
            body = struct.pack(">hhii", -1, 1, 5000, 1) + struct.pack(">h", 4) + b"long" + struct.pack(">iii", 1, 0, len(sent)) + sent
            connection.sendall(request(0, 7, body))

        for _ in range(5):
            send(large)
            send(batch([record(0, value=b"after")]))
            begun = time.monotonic()
            producer.produce("other", b"x")
            assert producer.flush(20) == 0
            slowest = max(slowest, time.monotonic() - begun)
        ends = [struct.unpack(">ihq", answer(connection)[-34:-20]) for _ in range(10)]
    assert [error for _, error, _ in ends] == [0] * 10
    offsets = [offset for _, _, offset in ends]
    assert offsets == [n // 2 * 101 + n % 2 * 100 for n in range(10)]
    # A debug build; the whole batch takes several times as long.
    assert slowest < 0.5


def test_a_look_up_by_time_in_a_long_batch_does_not_hold_up_others(make_broker):
    broker = make_broker(settings={"cores": 1})
    create(broker, "long", "other")
    # The record that is looked for is the last of 100 MB.
    now = int(time.time() * 1000)
    long = batch([record(n, time_delta=n, value=b"\0" * 1_000_000) for n in range(100)], 4, times=(now, now + 99))
    producer = Producer({"bootstrap.servers": broker.bootstrap, "linger.ms": 0})
    with connect(broker) as connection:
        assert produce(connection, b"long", (0, long)) == [0]
    asking = [connect(broker) for _ in range(8)]
    # ListOffsets 1.
    by_time = struct.pack(">iih", -1, 1, 4) + b"long" + struct.pack(">iiq", 1, 0, now + 99)
    for connection in asking:
        connection.sendall(request(2, 1, by_time) * 2)
    slowest = 0.0
    for _ in range(20):
        begun = time.monotonic()
        producer.produce("other", b"x")
        assert producer.flush(20) == 0
        slowest = max(slowest, time.monotonic() - begun)
    for connection in asking:
        for _ in range(2):
            error, timestamp, offset = struct.unpack(">hqq", answer(connection)[-18:])
            assert (error, timestamp, offset) == (0, now + 99, 99)
        connection.close()
    assert slowest < 0.5
