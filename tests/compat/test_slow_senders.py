"""A client that states a length and sends little of it, or whose request waits, keeps no memory from others."""

import struct
import threading
import time

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from test_bad_input import connect, frame, is_closed, request
from test_hang_ups import fetch, heartbeat, joined, text

# Requests of all connections have a few MB of it.
MEMORY = "64MiB"
LARGE = 7_000_000


@pytest.fixture
def narrow(make_broker):
    broker = make_broker(settings={"memory": MEMORY, "cores": 1})
    admin = AdminClient({"bootstrap.servers": broker.bootstrap})
    for future in admin.create_topics([NewTopic("quiet", 1, 1), NewTopic("busy", 1, 1)]).values():
        future.result(10)
    return broker


def slowest(broker, seconds=2.0, size=600_000):
    """Small records and large ones, one after the other, each on a connection of its own; the longest that one took."""
    worst = 0.0
    producer = Producer({"bootstrap.servers": broker.bootstrap, "acks": "all", "linger.ms": 0, "message.max.bytes": 1 << 20})
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for value in [b"x", b"x" * size]:
            failed = []
            began = time.monotonic()
            producer.produce("busy", value, on_delivery=lambda e, m: failed.append(e))
            assert producer.flush(20) == 0 and failed == [None]
            worst = max(worst, time.monotonic() - began)
    return worst


def test_lengths_that_are_only_stated(narrow):
    drips = [connect(narrow) for _ in range(30)]
    for connection in drips:
        connection.sendall(struct.pack(">i", LARGE) + b"\0")
    stop = threading.Event()

    def drip():
        while not stop.wait(0.5):
            for connection in drips:
                connection.sendall(b"\0")

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        assert slowest(narrow) < 1
    finally:
        stop.set()
        thread.join()
        for connection in drips:
            connection.close()


@pytest.mark.parametrize("stated, sent, longest", [(LARGE, 2_500_000, 1), (1_900_000, 900_000, 10)], ids=["larger", "as large"])
def test_requests_that_are_half_there(narrow, stated, sent, longest):
    """They have all there is for their size. Smaller ones do not notice; for one of that size, those that only drip are closed."""
    halves = [connect(narrow) for _ in range(6)]
    for connection in halves:
        connection.sendall(struct.pack(">i", stated) + b"\0" * sent)
    time.sleep(0.5)
    stop = threading.Event()

    def drip():
        while not stop.wait(0.5):
            for connection in halves:
                try:
                    connection.sendall(b"\0")
                except OSError:
                    pass

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        assert slowest(narrow) < longest
        assert slowest(narrow) < 1
    finally:
        stop.set()
        thread.join()


def test_a_fetch_that_waits_holds_what_it_asks_for_only(narrow):
    waits = [connect(narrow) for _ in range(3)]
    for connection in waits:
        connection.sendall(frame(fetch()[4:] + b"\0" * LARGE))
    time.sleep(0.5)
    assert slowest(narrow) < 1
    for connection in waits:
        connection.close()


def test_a_join_that_waits_holds_what_it_asks_for_only(narrow):
    def join(metadata, member=""):
        protocols = struct.pack(">i", 1) + text("range") + struct.pack(">i", len(metadata)) + metadata
        head = text("g") + struct.pack(">ii", 60_000, 0x7FFFFFFF) + text(member) + text("consumer")
        return request(11, 3, head + protocols)

    with connect(narrow) as first, connect(narrow) as second:
        first.sendall(join(b"x"))
        code, generation, member, _ = joined(first)
        assert code == 0
        second.sendall(frame(join(b"x")[4:] + b"\0" * LARGE))
        time.sleep(0.5)
        # It waits for the first, which may take its time.
        assert heartbeat(first, generation, member) == 27
        assert slowest(narrow) < 1
