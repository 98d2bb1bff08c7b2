"""Random well-formed requests of every API and version, with lengths and numbers at their limits: the broker answers or closes, and lives."""

import os
import pathlib
import random
import re
import socket
import struct

from test_bad_input import answer, assert_serving, connect, receive, request

SHAPES = pathlib.Path(__file__).resolve().parents[2] / "net/src/kafka/shape.rs"
KEYS = {
    "Produce": 0, "Fetch": 1, "ListOffsets": 2, "Metadata": 3, "OffsetCommit": 8, "OffsetFetch": 9, "FindCoordinator": 10,
    "JoinGroup": 11, "Heartbeat": 12, "LeaveGroup": 13, "SyncGroup": 14, "DescribeGroups": 15, "ListGroups": 16, "ApiVersions": 18,
    "CreateTopics": 19, "DeleteTopics": 20, "DeleteRecords": 21, "InitProducerId": 22, "OffsetForLeaderEpoch": 23, "DescribeAcls": 29,
    "DescribeConfigs": 32, "AlterConfigs": 33, "AlterReplicaLogDirs": 34, "DescribeLogDirs": 35, "CreatePartitions": 37,
    "DeleteGroups": 42, "ElectLeaders": 43, "IncrementalAlterConfigs": 44, "AlterPartitionReassignments": 45,
    "ListPartitionReassignments": 46, "OffsetDelete": 47, "DescribeQuorum": 55, "UpdateFeatures": 57, "DescribeCluster": 60,
    "DescribeProducers": 61, "UnregisterBroker": 64, "ListConfigResources": 74, "DescribeTopicPartitions": 75, "AddRaftVoter": 80,
    "RemoveRaftVoter": 81,
}  # fmt: skip
ROUNDS = 20


class Shape:
    """The broker's own notation of requests (`net/src/kafka/shape.rs`), written instead of read."""

    def __init__(self, rng, version, flexible):
        self.rng, self.version, self.flexible = rng, version, flexible

    def count(self, number, form):
        if not self.flexible:
            return struct.pack(form, number)
        number, out = number + 1, b""
        while number > 0x7F:
            out += bytes([number & 0x7F | 0x80])
            number >>= 7
        return out + bytes([number])

    def number(self, width):
        limit = 1 << 8 * width - 1
        value = self.rng.choice([-1, 0, 0, 1, 1, 2, 3, 1000, limit - 1, -limit])
        return (max(-limit, min(limit - 1, value)) & (1 << 8 * width) - 1).to_bytes(width)

    def string(self, nullable):
        length = self.rng.choice([0, 1, 1, 2, 8, 249, 32767] + [-1] * nullable)
        text = self.rng.choice([b"t", b"g", b"\x01", b"0", "ä".encode()]) * max(length, 0)
        return self.count(min(length, 32767), ">h") + text[: max(length, 0)].decode(errors="ignore").encode().ljust(max(length, 0), b"t")

    def bytes(self):
        blob = self.rng.randbytes(self.rng.choice([0, 1, 61, 200]))
        return self.count(len(blob), ">i") + blob

    def structure(self, notation):
        out, at = b"", 0
        while at < len(notation):
            kind, begin = notation[at], at
            if kind == " ":
                at += 1
                continue
            at += 1 + (kind == "?")
            if kind in "[{?":
                depth = 1
                while depth:
                    depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(notation[at], 0)
                    at += 1
            field, first, last = notation[begin:at], 0, 32767
            if found := re.match(r"@(\d+)(?:-(\d+))?", notation[at:]):
                first, last = int(found[1]), int(found[2] or 32767)
                at += found.end()
            if first <= self.version <= last:
                out += self.field(field)
        return out + (b"\0" if self.flexible else b"")

    def field(self, field):
        kind = field[0]
        if kind in "bhild":
            return self.number({"b": 1, "h": 2, "i": 4, "l": 8, "d": 8}[kind])
        if kind in "ut":
            return self.rng.choice([bytes(16), self.rng.randbytes(16)])
        if kind in "sn":
            return self.string(kind == "n")
        if kind == "y":
            return self.bytes()
        if kind == "?":
            there = self.rng.random() < 0.5
            return b"\1" + self.structure(field[2:-1]) if there else b"\xff"
        length = self.rng.choice([0, 1, 1, 2, 5])
        out = self.count(length, ">i")
        for _ in range(length):
            element = self.structure(field[1:-1])
            # Plain elements have no tags of their own.
            out += element[:-1] if kind == "{" and self.flexible else element
        return out


def shapes():
    found = re.findall(r'ApiKey::(\w+) => \(\s*(i16::MAX|\d+),\s*"([^"]*)",?\s*\)', SHAPES.read_text())
    return {KEYS[name]: (32767 if flexible == "i16::MAX" else int(flexible), notation) for name, flexible, notation in found}


def served(broker):
    """Ranges of versions by API, as ApiVersions 0 says."""
    with connect(broker) as connection:
        connection.sendall(request(18, 0, b""))
        told = answer(connection)
    count = struct.unpack(">i", told[6:10])[0]
    return [struct.unpack(">hhh", told[10 + 6 * n : 16 + 6 * n]) for n in range(count)]


def test_the_broker_answers_or_closes_and_lives(make_broker):
    seed = int(os.environ.get("MILLRACE_SEED", random.randrange(1 << 32)))
    print(f"MILLRACE_SEED={seed}")
    broker = make_broker(settings={"group.initial.rebalance.delay.ms": 0})
    known, offered = shapes(), served(broker)
    assert {key for key, _, _ in offered} == set(known)
    answered = closed = silent = 0
    for key, first, last in offered:
        flexible_from, notation = known[key]
        for version in range(max(first, 3) if key == 0 else first, last + 1):
            for n in range(ROUNDS):
                rng = random.Random(f"{seed} {key} {version} {n}")
                flexible = version >= flexible_from
                body = Shape(rng, version, flexible).structure(notation)
                head = struct.pack(">hhih", key, version, 7, 1) + b"c" + (b"\0" if flexible else b"")
                with connect(broker) as connection:
                    connection.sendall(struct.pack(">i", len(head + body)) + head + body)
                    connection.settimeout(0.3)
                    try:
                        length, correlation = struct.unpack(">ii", receive(connection, 8))
                        assert correlation == 7
                        connection.settimeout(20)
                        receive(connection, length - 4)
                        answered += 1
                    except socket.timeout:
                        # It waits for records, members, or replicas.
                        silent += 1
                    except ConnectionError:
                        closed += 1
                assert broker.process.poll() is None, f"API {key} version {version} round {n}: {broker.log_text()[-2000:]}"
    assert_serving(broker)
    assert "cannot be encoded" not in broker.log_text()
    print(answered, "answered", closed, "closed", silent, "wait")
    assert answered > closed, "most of them are well-formed"
