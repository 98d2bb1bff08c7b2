"""A request that names something many times, or very much, costs what it is worth, and nobody is served later for it."""

import struct
import time

from test_bad_input import answer, connect, is_closed, request
from test_hang_ups import text
from test_large_changes import compact, uvarint
from test_many_elements import Probe, create, metadata

MEMORY = "256MiB"
OFFSETS_TOO_LARGE = 28


def flexible(key, version, body):
    return request(key, version, b"\0" + body + b"\0")


def describe_configs(resources):
    """Of topics (2) and brokers (4), with synonyms and documentation."""
    named = b"".join(bytes([kind]) + compact(name) + b"\0\0" for kind, name in resources)
    return flexible(32, 4, uvarint(len(resources) + 1) + named + b"\1\1")


def asked(broker, message):
    with connect(broker) as connection:
        connection.settimeout(60)
        connection.sendall(message)
        return answer(connection)


def test_names_that_stand_in_a_request_many_times(make_broker):
    broker = make_broker(args=["--memory", MEMORY])
    probe = Probe(broker)
    asked(broker, create(["t"]))
    before = broker.rss_mib()
    once = asked(broker, describe_configs([(4, "0"), (2, "t")]))
    assert asked(broker, describe_configs([(4, "0"), (2, "t")] * 40_000)) == once
    many = 90_000
    for key, version, begin, end in [(15, 5, b"", b"\0"), (10, 4, b"\0", b""), (16, 4, b"", b"")]:
        empty = asked(broker, flexible(key, version, begin + uvarint(2) + b"\x01" + end))
        assert asked(broker, flexible(key, version, begin + uvarint(many + 1) + b"\x01" * many + end)) == empty
    # The first alone took 3 GiB and 11 s.
    assert broker.rss_mib() - before < 120
    assert probe.finish() < 2


def test_commits_that_are_longer_than_the_log_takes(make_broker):
    broker = make_broker(args=["--memory", MEMORY])
    probe = Probe(broker)
    asked(broker, request(10, 0, text("g")))
    time.sleep(1)

    def commit(group, partitions):
        one = struct.pack(">iqi", 0, 5, -1) + compact("") + b"\0"
        topics = uvarint(2) + compact("probe") + uvarint(partitions + 1) + one * partitions + b"\0"
        head = compact(group) + struct.pack(">i", -1) + compact("") + b"\0"
        return asked(broker, flexible(8, 8, head + topics))

    def codes(got, partitions):
        return struct.unpack(">" + "ihx" * partitions, got[-7 * partitions - 2 : -2])[1::2]

    before = broker.rss_mib()
    assert set(codes(commit("g" * 32_000, 8_000), 8_000)) == {OFFSETS_TOO_LARGE}
    assert set(codes(commit("g", 8_000), 8_000)) == {0}
    assert set(codes(commit("g" * 32_000, 8), 8)) == {0}
    # It took 600 MiB, and 256 MB of the disk.
    assert broker.rss_mib() - before < 100
    assert probe.finish() < 2


def test_elements_are_bounded_by_the_memory(make_broker):
    broker = make_broker(args=["--memory", MEMORY])
    probe = Probe(broker)
    before = broker.rss_mib()
    connections = [connect(broker) for _ in range(20)]
    for connection in connections:
        connection.sendall(metadata([f"bad name {n}" for n in range(90_000)]))
    peak = 0
    for connection in connections:
        connection.settimeout(60)
        assert len(answer(connection)) > 90_000 * 10
        peak = max(peak, broker.rss_mib())
        connection.close()
    # One at a time.
    assert peak - before < 250
    with connect(broker) as connection:
        connection.settimeout(30)
        connection.sendall(flexible(10, 4, b"\0" + uvarint(500_001) + b"\x01" * 500_000))
        assert is_closed(connection)
    until = time.monotonic() + 5
    while "a request of 500000 elements" not in broker.log_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert probe.finish() < 5
