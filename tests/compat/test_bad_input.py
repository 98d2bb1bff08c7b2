"""Bytes that no client should send: the sender gets what Kafka gives, the others notice nothing."""

import random
import socket
import struct
import time

import pytest
from confluent_kafka import Consumer, Producer


def connect(broker):
    connection = socket.create_connection(("127.0.0.1", broker.port), 10)
    connection.settimeout(10)
    return connection


def frame(payload):
    return struct.pack(">i", len(payload)) + payload


def request(key, version, body, correlation=7):
    return frame(struct.pack(">hhih", key, version, correlation, -1) + body)


def answer(connection):
    head = receive(connection, 4)
    return receive(connection, struct.unpack(">i", head)[0])


def receive(connection, count):
    got = b""
    while len(got) < count:
        piece = connection.recv(count - len(got))
        if not piece:
            raise ConnectionError("closed")
        got += piece
    return got


def is_closed(connection):
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def assert_serving(broker):
    failed = []
    producer = Producer({"bootstrap.servers": broker.bootstrap})
    producer.produce("others", b"x", on_delivery=lambda e, m: e and failed.append(e))
    assert producer.flush(10) == 0 and not failed


@pytest.mark.parametrize("sent", [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    struct.pack(">i", -1),
    struct.pack(">i", 0x7fffffff),
    frame(b""),
    frame(b"\0\x03"),
    frame(b"\xff" * 100),
    request(999, 0, b""),
    request(3, 99, b""),
    request(0, 2, b"\0" * 20),
    # Metadata v1 that states two thousand million topics.
    request(3, 1, struct.pack(">i", 0x7fffffff) + b"\0\1a"),
    # Fetch v4 cut short.
    request(1, 4, b"\0\0"),
    # Produce v3 with a negative array.
    request(0, 3, struct.pack(">hhii", -1, 1, 1000, -5)),
], ids=range(12))
def test_garbage_closes_its_own_connection_only(broker, sent):
    with connect(broker) as connection:
        connection.sendall(sent)
        assert is_closed(connection)
    assert_serving(broker)


def test_bytes_behind_a_request_are_left_alone_as_kafka_does(broker):
    with connect(broker) as connection:
        connection.sendall(request(3, 1, struct.pack(">i", 0) + b"more"))
        length, = struct.unpack(">i", connection.recv(4))
        assert length > 0 and connection.recv(length)


def test_api_versions_too_new_is_answered_in_version_0(broker):
    with connect(broker) as connection:
        connection.sendall(request(18, 77, b""))
        reply = answer(connection)
        correlation, error, count = struct.unpack(">ihi", reply[:10])
        assert (correlation, error) == (7, 35) and count > 20


def test_a_frame_that_never_ends_costs_only_what_was_sent(make_broker):
    broker = make_broker()
    before = broker.rss_mib()
    connections = [connect(broker) for _ in range(50)]
    for connection in connections:
        connection.sendall(struct.pack(">i", 100_000_000) + b"\0")
    time.sleep(1)
    assert broker.rss_mib() - before < 30, "stated lengths are not allocated in advance"
    for connection in connections:
        connection.close()
    assert_serving(broker)


def fetch(topic, offset=0, max_wait_ms=100, max_bytes=1 << 20):
    partition = struct.pack(">iqi", 0, offset, max_bytes)
    return request(1, 4, struct.pack(">iiiibi", -1, max_wait_ms, 1, max_bytes, 0, 1) + string(topic) + struct.pack(">i", 1) + partition)


def fill(broker, topic, megabytes):
    producer = Producer({"bootstrap.servers": broker.bootstrap, "batch.size": 50_000})
    for _ in range(megabytes * 100):
        producer.produce(topic, random.randbytes(10_000))
        producer.poll(0)
    assert producer.flush(30) == 0


def test_answers_that_nobody_reads_cost_no_more_than_a_little(make_broker):
    broker = make_broker(args=["--memory", "256MiB"])
    fill(broker, "big", 30)
    before = broker.rss_mib()
    one = connect(broker)
    one.sendall(fetch(b"big") * 500)
    many = [connect(broker) for _ in range(200)]
    for connection in many:
        connection.sendall(fetch(b"big") * 20)
    time.sleep(3)
    assert broker.rss_mib() - before < 100, "answers wait in the log, not in memory"
    assert_serving(broker)
    consumer = Consumer({"bootstrap.servers": broker.bootstrap, "group.id": "g", "auto.offset.reset": "earliest"})
    consumer.subscribe(["big"])
    assert sum(m.error() is None for m in consumer.consume(100, 30)) == 100
    consumer.close()
    # Who reads in the end gets all of it.
    for _ in range(500):
        answer(one)
    for connection in (one, *many):
        connection.close()


def test_connections_that_nothing_moves_over_are_closed(make_broker):
    broker = make_broker(settings={"connections.max.idle.ms": "2000"})
    fill(broker, "big", 20)
    began = time.time()
    says_nothing, stops_midway, reads_nothing, waits_long, lives = (connect(broker) for _ in range(5))
    stops_midway.sendall(fetch(b"big")[:20])
    reads_nothing.sendall(fetch(b"big") * 50)
    waits_long.sendall(fetch(b"big", offset=2000, max_wait_ms=0x7fffffff))
    while time.time() - began < 6:
        lives.sendall(request(18, 0, b""))
        answer(lives)
        time.sleep(0.5)
    assert is_closed(says_nothing) and is_closed(stops_midway)
    with pytest.raises(ConnectionError):
        for _ in range(50):
            answer(reads_nothing)
    # It was answered in time, with nothing.
    answer(waits_long)
    lives.sendall(request(18, 0, b""))
    answer(lives)
    assert "sent the rest of a request, or read its answer, too slowly or not at all" in broker.log_text()


def test_random_bytes_for_every_api(broker):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for round in range(600):
        with connect(broker) as connection:
            key = rng.choice([*range(24), 32, 33, 35, 37, 42, 44, 47, 60, 61, 75])
            body = bytes(rng.choice((0, 1, 255, rng.randrange(256))) for _ in range(rng.randrange(60)))
            try:
                connection.sendall(request(key, rng.randrange(14), body))
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass
            except ConnectionError:
                pass
    assert_serving(broker)


def batch(records=b"\x0e\0\0\0\1\2x\0", count=1, delta=0, magic=2, attributes=0, length=None, crc=None,
          producer=(-1, -1, -1)):
    body = struct.pack(">hiqqqhii", attributes, delta, 0, 0, *producer, count) + records
    crc = crc32c(body) if crc is None else crc
    inner = struct.pack(">ibI", -1, magic, crc) + body
    return struct.pack(">qi", 0, len(inner) if length is None else length) + inner


def crc32c(data):
    crc = 0xffffffff
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82f63b78 if crc & 1 else 0)
    return crc ^ 0xffffffff


def string(s):
    return struct.pack(">h", len(s)) + s


def produce(connection, topic, *partitions, acks=1):
    body = struct.pack(">hhii", -1, acks, 5000, 1) + string(topic) + struct.pack(">i", len(partitions))
    for index, records in partitions:
        body += struct.pack(">ii", index, len(records)) + records
    connection.sendall(request(0, 7, body))
    if acks == 0:
        return None
    reply = answer(connection)
    at = 4 + 4 + 2 + len(topic) + 4
    errors = []
    for _ in partitions:
        errors.append(struct.unpack(">ih", reply[at:at + 6])[1])
        at += 4 + 2 + 8 + 8 + 8
    return errors


@pytest.mark.parametrize("bad, error", [
    (batch(crc=1), 2),
    (batch(magic=1), 43),
    (batch(count=2), 87),
    (batch(count=0, delta=-1), 87),
    (batch(count=-1), 87),
    (batch(delta=3), 87),
    (batch(length=5), 87),
    (batch(length=-1), 87),
    (batch(length=10_000), 2),
    (batch(records=b"\xff\xff"), 87),
    (batch(attributes=0x20), 87),
    (batch(attributes=0x10), 42),
    (batch(attributes=0x08), 32),
    (batch(attributes=0x07), 87),
    (batch(producer=(5, -1, 0)), 87),
    (batch() + batch(), 87),
    (b"", 87),
    (b"short", 2),
    (batch(), 0),
], ids=range(19))
def test_bad_batches_get_kafkas_codes(broker, bad, error):
    assert_serving(broker)
    with connect(broker) as connection:
        assert produce(connection, b"others", (0, bad)) == [error]
        assert produce(connection, b"others", (0, batch())) == [0], "the connection goes on"


def test_partition_errors_stay_with_their_partition(broker):
    assert_serving(broker)
    with connect(broker) as connection:
        errors = produce(connection, b"others", (0, batch()), (99, batch()), (-1, batch()), (0, batch()), (1, batch(crc=0)))
        assert errors == [0, 3, 3, 42, 2]
        assert produce(connection, b"nowhere", (0, batch())) == [3]
        assert produce(connection, b"others", (0, batch()), acks=9) == [21]


def test_sequences_of_idempotent_producers(broker):
    assert_serving(broker)
    rng = random.Random()
    producer = rng.randrange(1 << 40, 1 << 41)
    with connect(broker) as connection:
        send = lambda epoch, sequence: produce(connection, b"others", (2, batch(producer=(producer, epoch, sequence))))
        assert send(0, 0) == [0]
        assert send(0, 0) == [0], "a retry is answered, not appended"
        # Batches before it may still be on their way to a broker that has just begun to lead.
        until = time.monotonic() + 15
        while (got := send(0, 2)) == [6] and time.monotonic() < until:
            time.sleep(0.2)
        assert got == [45], "a gap is refused"
        assert send(0, 1) == [0]
        assert send(1, 5) == [45], "a new epoch begins at 0"
        assert send(1, 0) == [0]
        assert send(0, 2) == [47], "the old epoch is fenced"


def test_acks_0_with_an_error_closes_the_connection(broker):
    with connect(broker) as connection:
        produce(connection, b"others", (0, batch(crc=0)), acks=0)
        assert is_closed(connection)


def test_pipelined_requests_are_answered_in_order(broker):
    assert_serving(broker)
    with connect(broker) as connection:
        sent = b""
        for n in range(200):
            if n % 3:
                body = struct.pack(">hhii", -1, -1, 5000, 1) + string(b"others") + struct.pack(">iii", 1, n % 3, len(batch()))
                sent += request(0, 7, body + batch(), correlation=n)
            else:
                sent += request(18, 0, b"", correlation=n)
        connection.sendall(sent)
        assert [struct.unpack(">i", answer(connection)[:4])[0] for _ in range(200)] == list(range(200))


def test_a_second_broker_on_the_same_folder_is_refused(make_broker):
    broker = make_broker()
    with pytest.raises(RuntimeError, match="in use by a broker"):
        make_broker(data_dir=broker.data_dir)
    assert_serving(broker)


def test_a_port_in_use_is_refused_and_says_what_to_do(make_broker):
    broker = make_broker()
    import conftest
    second = conftest.Broker()
    second.port = broker.port
    with pytest.raises(RuntimeError, match="--kafka-listen"):
        second.start()
    second.process.wait(10)
    second.cleanup()


def test_misspelt_settings_are_refused_with_a_hint():
    import conftest
    broker = conftest.Broker(settings={"num.partitons": "3"})
    with pytest.raises(RuntimeError, match="unknown setting"):
        broker.start()
    broker.cleanup()
