"""Requests with very many elements, and very many waiting requests: the others are served meanwhile."""

import struct
import threading
import time

from confluent_kafka import Producer
from test_bad_input import answer, connect, request
from test_hang_ups import text


def create(names):
    topics = b"".join(text(name) + struct.pack(">ihii", 1, 1, 0, 0) for name in names)
    return request(19, 2, struct.pack(">i", len(names)) + topics + struct.pack(">i?", 60_000, False))


def metadata(names):
    return request(3, 1, struct.pack(">i", len(names)) + b"".join(map(text, names)))


class Probe:
    """A record after the other, and the longest that one took."""

    def __init__(self, broker):
        self.producer = Producer({"bootstrap.servers": broker.bootstrap, "acks": "all", "linger.ms": 0})
        self.stop, self.count, self.longest = threading.Event(), 0, 0.0
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.one()
        self.longest = 0.0
        self.thread.start()

    def one(self):
        began = time.monotonic()
        self.producer.produce("probe", b"x")
        assert self.producer.flush(60) == 0
        self.longest = max(self.longest, time.monotonic() - began)
        self.count += 1

    def run(self):
        while not self.stop.is_set():
            self.one()

    def finish(self):
        self.stop.set()
        self.thread.join(60)
        return self.longest


def test_many_topics_are_made_while_others_are_served(make_broker):
    broker = make_broker(settings={"memory": "512MiB"})
    probe = Probe(broker)
    with connect(broker) as connection:
        connection.settimeout(60)
        began = time.monotonic()
        connection.sendall(create([f"t-{n}" for n in range(20_000)]))
        answer(connection)
        connection.sendall(metadata([f"auto-{n}" for n in range(2_000)]))
        answer(connection)
        # It took minutes when each topic looked at all others.
        assert time.monotonic() - began < 30
    assert probe.finish() < 5
    assert broker.stop(20) == 0
    broker.start(60)
    with connect(broker) as connection:
        connection.sendall(metadata(["t-19999", "auto-1999"]))
        assert answer(connection).count(b"\0\0") > 2


def test_names_that_no_topic_may_have(make_broker):
    broker = make_broker()
    probe = Probe(broker)
    with connect(broker) as connection:
        connection.settimeout(60)
        began = time.monotonic()
        connection.sendall(metadata([f"bad name {n}" for n in range(100_000)]))
        assert answer(connection).count(b"bad name") == 100_000
        assert time.monotonic() - began < 20
    assert probe.finish() < 5


def test_many_fetches_wait_at_one_partition(make_broker):
    broker = make_broker(settings={"memory": "512MiB"})
    Probe(broker).finish()
    # Each append wakes all of them, and none has enough yet.
    unreachable, wait_ms = 1 << 30, 60_000
    body = struct.pack(">iiiibi", -1, wait_ms, unreachable, 1 << 20, 0, 1) + text("probe") + struct.pack(">iiqi", 1, 0, 0, 1 << 20)
    waiting = [connect(broker) for _ in range(1_000)]
    for connection in waiting:
        connection.sendall(request(1, 4, body))
    probe = Probe(broker)
    time.sleep(2)
    assert probe.finish() < 2 and probe.count > 10
    for connection in waiting:
        connection.close()
