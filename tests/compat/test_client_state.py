"""What the broker keeps for clients, and has ready for those that do not read it, stays within its memory."""

import struct
import time

from test_bad_input import answer, connect, request
from test_hang_ups import text
from test_many_elements import Probe, metadata

MEMORY = "256MiB"


def test_fetch_sessions_of_many_partitions(make_broker):
    broker = make_broker(args=["--memory", MEMORY])
    probe = Probe(broker)
    before = broker.rss_mib()
    parts = b"".join(struct.pack(">iqqi", n, 0, 0, 1) for n in range(20_000))
    # Fetch 7: a new session of partitions that do not exist.
    body = struct.pack(">iiiibii", -1, 0, 1, 1, 0, 0, 0) + struct.pack(">i", 1) + text("n" * 200)
    body += struct.pack(">i", 20_000) + parts + struct.pack(">i", 0)
    with connect(broker) as connection:
        connection.settimeout(60)
        for _ in range(100):
            connection.sendall(request(1, 7, body))
            answer(connection)
    # A hundred of them took 700 MiB.
    assert broker.rss_mib() - before < 150
    assert probe.finish() < 3


def test_metadata_that_nobody_reads(make_broker):
    broker = make_broker(args=["--memory", MEMORY])
    probe = Probe(broker)
    names = [f"wide-{n}" for n in range(5)]
    with connect(broker) as connection:
        connection.settimeout(60)
        for name in names:
            topic = text(name) + struct.pack(">ihii", 8_000, 1, 0, 0)
            connection.sendall(request(19, 2, struct.pack(">i", 1) + topic + struct.pack(">i?", 60_000, False)))
            answer(connection)
        connection.sendall(metadata(names))
        one = len(answer(connection))
        assert one > 40_000 * 20
    before = broker.rss_mib()
    connections = [connect(broker) for _ in range(300)]
    for connection in connections:
        connection.sendall(metadata(names) * 20)
    time.sleep(3)
    # An answer for each would be 300 MiB.
    assert broker.rss_mib() - before < 150
    assert probe.finish() < 3
    # Who reads is answered all the same.
    with connect(broker) as patient:
        patient.settimeout(60)
        patient.sendall(metadata(names))
        assert len(answer(patient)) == one
    for connection in connections:
        connection.close()
