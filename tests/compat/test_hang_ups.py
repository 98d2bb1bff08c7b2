"""Who hangs up while a request of his waits leaves his place to others, and his group as Kafka would."""

import contextlib
import os
import socket
import struct
import time

import pytest
from confluent_kafka.admin import AdminClient, NewTopic
from test_bad_input import answer, connect, request

PLACES = 40
FOR_EVER = 0x7FFFFFFF
REBALANCE_IN_PROGRESS = 27


@pytest.fixture
def small(make_broker):
    broker = make_broker(settings={"max.connections": PLACES})
    admin = AdminClient({"bootstrap.servers": broker.bootstrap})
    admin.create_topics([NewTopic("quiet", 1, 1)])["quiet"].result(10)
    del admin
    wait("the admin client has gone", lambda: sockets(broker) == 0)
    return broker


def wait(what, holds, timeout=5):
    until = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < until, f"{what}: not within {timeout} s"
        time.sleep(0.02)


def sockets(broker):
    """Connections of clients that the broker has open."""
    ours = set()
    for fd in os.listdir(f"/proc/{broker.pid}/fd"):
        with contextlib.suppress(OSError):
            ours.add(os.readlink(f"/proc/{broker.pid}/fd/{fd}"))
    port = f":{broker.port:04X}"
    lines = [line.split() for line in open(f"/proc/{broker.pid}/net/tcp").readlines()[1:]]
    return sum(1 for line in lines if line[1].endswith(port) and line[3] != "0A" and f"socket:[{line[9]}]" in ours)


def text(s):
    return struct.pack(">h", len(s)) + s.encode()


def fetch(wait_ms=FOR_EVER):
    """Waits for a byte of an empty partition."""
    head = struct.pack(">iiiibi", -1, wait_ms, 1, 1 << 20, 0, 1)
    return request(1, 4, head + text("quiet") + struct.pack(">iiqi", 1, 0, 0, 1 << 20))


def join(member=""):
    protocols = struct.pack(">i", 1) + text("range") + struct.pack(">i", 1) + b"x"
    timeouts = struct.pack(">ii", 6_000, FOR_EVER)
    return request(11, 3, text("g") + timeouts + text(member) + text("consumer") + protocols)


def joined(connection):
    """Error, generation, and the member's id."""
    got = answer(connection)
    code, generation = struct.unpack(">hi", got[8:14])
    at, names = 14, []
    for _ in range(3):
        length = struct.unpack(">h", got[at : at + 2])[0]
        names.append(got[at + 2 : at + 2 + length].decode())
        at += 2 + length
    return code, generation, names[2], struct.unpack(">i", got[at : at + 4])[0]


def heartbeat(connection, generation, member):
    connection.sendall(request(12, 1, text("g") + struct.pack(">i", generation) + text(member)))
    return struct.unpack(">h", answer(connection)[8:10])[0]


def assert_takes_all(broker):
    """As many connections as there are places for are served."""
    wait("all places are free", lambda: sockets(broker) == 0)
    with contextlib.ExitStack() as stack:
        for _ in range(PLACES):
            connection = stack.enter_context(connect(broker))
            connection.sendall(request(18, 0, b""))
            answer(connection)


def test_fetches_of_those_who_have_gone(small):
    for more in [b"", fetch() * 200]:
        wait("all places are free", lambda: sockets(small) == 0)
        gone = [connect(small) for _ in range(PLACES)]
        for connection in gone:
            connection.sendall(fetch() + more)
        time.sleep(0.3)
        assert sockets(small) == PLACES, "they wait"
        for connection in gone:
            connection.close()
        assert_takes_all(small)


def test_a_peer_that_only_sends_no_more_is_answered(small):
    with connect(small) as connection:
        connection.sendall(fetch() + request(18, 0, b""))
        time.sleep(0.2)
        connection.shutdown(socket.SHUT_WR)
        answer(connection)
        answer(connection)
        assert connection.recv(1) == b""


def test_joins_of_those_who_have_gone(small):
    with connect(small) as stays:
        stays.sendall(join())
        code, generation, member, _ = joined(stays)
        assert code == 0
        gone = [connect(small) for _ in range(PLACES - 1)]
        for connection in gone:
            connection.sendall(join())
        wait("they join", lambda: heartbeat(stays, generation, member) == REBALANCE_IN_PROGRESS)
        time.sleep(0.3)
        assert sockets(small) == PLACES, "they wait for the first"
        for connection in gone:
            connection.close()
        wait("their places are free", lambda: sockets(small) == 1)
        # They are members until their sessions expire, as in Kafka.
        assert heartbeat(stays, generation, member) == REBALANCE_IN_PROGRESS
        stays.sendall(join(member))
        code, generation, same, members = joined(stays)
        assert (code, same, members) == (0, member, PLACES)
        wait("they expire", lambda: heartbeat(stays, generation, member) == REBALANCE_IN_PROGRESS, timeout=20)
        wait("all of them", lambda: rejoin(stays, member) == 1, timeout=20)
    assert_takes_all(small)


def rejoin(connection, member):
    connection.sendall(join(member))
    return joined(connection)[3]
