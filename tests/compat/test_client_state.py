"""What the broker keeps for clients stays within its memory."""

import struct

from test_bad_input import answer, connect, request
from test_hang_ups import text
from test_many_elements import Probe

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
