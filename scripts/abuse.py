#!/usr/bin/env python3
"""Mixed abuse of one broker by strangers, beside a producer and a consumer that are to notice nothing. Each minute prints what they
saw and what the broker took; exits 1 if the broker ends, a record that was acknowledged is lost, twice or out of order, or its
memory goes beyond --memory-max. Needs confluent-kafka (scripts/test.sh installs it into target/test-tools/venv).

    scripts/abuse.py [--minutes 60] [--seed N] [--memory 256MiB] [--memory-max 600] [--binary target/release/millrace]
"""

import argparse
import os
import pathlib
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/compat"))

from confluent_kafka import Consumer, Producer  # noqa: E402
from confluent_kafka.admin import AdminClient, NewTopic  # noqa: E402

import test_random_requests as shaped  # noqa: E402
from conftest import clean_environment, free_port  # noqa: E402
from test_bad_input import crc32c  # noqa: E402

RECORDS_A_SECOND = 100
PARTITIONS = 3


def text(value):
    return struct.pack(">h", len(value)) + value


def frame(key, version, body):
    head = struct.pack(">hhih", key, version, 7, -1)
    return struct.pack(">i", len(head + body)) + head + body


class Abuse:
    """One kind after the other, drawn from a seed; each takes some seconds at the most."""

    def __init__(self, port, rng):
        self.port, self.rng = port, rng
        self.kinds = [getattr(self, name) for name in dir(type(self)) if name.startswith("do_")]

    def connect(self, timeout=3):
        connection = socket.create_connection(("127.0.0.1", self.port), timeout)
        connection.settimeout(timeout)
        return connection

    def send(self, *requests, count=1, linger=0.0, read=False):
        """Sends the same on `count` connections, waits, and hangs up."""
        connections = []
        try:
            for _ in range(count):
                connections.append(self.connect())
                connections[-1].sendall(b"".join(requests))
            time.sleep(linger)
            if read:
                for connection in connections:
                    while connection.recv(1 << 16):
                        pass
        except OSError:
            pass
        finally:
            for connection in connections:
                connection.close()

    def do_random_requests(self):
        known = shaped.shapes()
        for _ in range(200):
            key = self.rng.choice([k for k in known if k not in (20, 42)])
            flexible_from, notation = known[key]
            version = self.rng.randrange(0, 10)
            flexible = version >= flexible_from
            try:
                body = shaped.Shape(self.rng, version, flexible).structure(notation)
            except Exception:
                continue
            head = struct.pack(">hhih", key, version, 7, 1) + b"c" + (b"\0" if flexible else b"")
            self.send(struct.pack(">i", len(head + body)) + head + body)

    def do_garbage(self):
        for _ in range(100):
            self.send(self.rng.randbytes(self.rng.randrange(1, 400)))

    def do_lengths(self):
        for length in (0x7FFFFFFF, 104_857_600, 100_000_000, -1, 0):
            self.send(struct.pack(">i", length) + b"x" * 100, count=5, linger=0.2)

    def do_drip(self):
        connections = [self.connect() for _ in range(50)]
        for byte in struct.pack(">i", 5_000_000):
            for connection in connections:
                try:
                    connection.sendall(bytes([byte]))
                except OSError:
                    pass
            time.sleep(0.5)
        for connection in connections:
            connection.close()

    def do_hang_up_on_fetches(self):
        fetch = struct.pack(">iiiibi", -1, 60_000, 1, 1 << 20, 0, 1) + text(b"steady") + struct.pack(">iiqi", 1, 0, 1 << 40, 1 << 20)
        self.send(frame(1, 4, fetch), count=300, linger=0.3)

    def do_hang_up_on_joins(self):
        group = b"g%d" % self.rng.randrange(1000)
        join = text(group) + struct.pack(">ii", 600_000, 600_000) + text(b"") + text(b"consumer")
        join += struct.pack(">i", 1) + text(b"range") + struct.pack(">i", 100_000) + b"m" * 100_000
        self.send(frame(11, 3, join), count=60, linger=0.3)

    def do_one_topic_many_times(self):
        self.send(frame(3, 1, struct.pack(">i", 3_000) + text(b"steady") * 3_000), count=3, linger=0.5)

    def do_invalid_names(self):
        names = b"".join(text(b"bad name %d" % n) for n in range(20_000))
        self.send(frame(3, 1, struct.pack(">i", 20_000) + names), linger=0.5)

    def do_unread_answers(self):
        self.send(frame(3, 1, struct.pack(">i", -1)) * 2_000, count=10, linger=1)

    def do_sessions(self):
        parts = b"".join(struct.pack(">iqqi", n, 0, 0, 1) for n in range(5_000))
        body = struct.pack(">iiiibii", -1, 0, 1, 1, 0, 0, 0) + struct.pack(">i", 1) + text(b"n" * 200)
        body += struct.pack(">i", 5_000) + parts + struct.pack(">i", 0)
        self.send(frame(1, 7, body), count=20, linger=0.3)

    def do_commits(self):
        for _ in range(50):
            group = b"c%d" % self.rng.randrange(100_000)
            body = text(group) + struct.pack(">i", -1) + text(b"") + struct.pack(">q", -1) + struct.pack(">i", 1) + text(b"steady")
            body += struct.pack(">iiq", 1, 0, 1) + text(b"m" * 4_000)
            self.send(frame(8, 2, body), linger=0.01)

    def do_bomb(self):
        packed = zlib.compressobj(9, zlib.DEFLATED, 31)
        payload = b"".join(packed.compress(bytes(1 << 20)) for _ in range(256)) + packed.flush()
        body = struct.pack(">hiqqqhii", 1, 0, 0, 0, -1, -1, -1, 1) + payload
        inner = struct.pack(">ibI", -1, 2, crc32c(body)) + body
        batch = struct.pack(">qi", 0, len(inner)) + inner
        produce = struct.pack(">hhii", -1, -1, 5_000, 1) + text(b"bombs") + struct.pack(">iii", 1, 0, len(batch)) + batch
        self.send(frame(0, 7, produce), count=4, linger=1)

    def do_many_topics(self):
        names = [f"topic-{self.rng.randrange(1 << 40)}" for _ in range(50)]
        topics = b"".join(text(n.encode()) + struct.pack(">ihii", 1, 1, 0, 0) for n in names)
        self.send(frame(19, 2, struct.pack(">i", len(names)) + topics + struct.pack(">i?", 10_000, False)), linger=1)
        gone = b"".join(text(n.encode()) for n in names)
        self.send(frame(20, 1, struct.pack(">i", len(names)) + gone + struct.pack(">i", 10_000)), linger=1)

    def do_config_values(self):
        value = b"y" * 32_767
        body = struct.pack(">ib", 1, 2) + text(b"steady") + struct.pack(">i", 1) + text(b"retention.ms") + text(value) + b"\0"
        self.send(frame(33, 0, body), count=20, linger=0.2)

    def do_pipelining(self):
        self.send(frame(18, 0, b"") * 20_000, linger=0.5)

    def do_idle_connections(self):
        self.send(b"", count=500, linger=1)


class Steady:
    """A producer of numbered records and a group that reads them."""

    def __init__(self, bootstrap):
        self.bootstrap, self.stop = bootstrap, threading.Event()
        self.acked, self.read, self.waits, self.errors = {}, {}, [], []
        self.threads = [threading.Thread(target=t, daemon=True) for t in (self.produce, self.consume)]
        for thread in self.threads:
            thread.start()

    def produce(self):
        producer = Producer({"bootstrap.servers": self.bootstrap, "enable.idempotence": True, "linger.ms": 0, "acks": "all"})
        number, begin = 0, time.monotonic()

        def done(sent, value):
            def report(error, message):
                if error:
                    self.errors.append(f"produce: {error}")
                else:
                    self.waits.append(time.monotonic() - sent)
                    self.acked[(message.partition(), message.offset())] = value

            return report

        while not self.stop.is_set():
            value = str(number).encode()
            producer.produce("steady", value, partition=number % PARTITIONS, on_delivery=done(time.monotonic(), value))
            number += 1
            due = begin + number / RECORDS_A_SECOND
            while (left := due - time.monotonic()) > 0:
                producer.poll(left)
        if producer.flush(60):
            self.errors.append("records were neither acknowledged nor refused")

    def consume(self):
        consumer = Consumer(
            {"bootstrap.servers": self.bootstrap, "group.id": "steady", "auto.offset.reset": "earliest", "auto.commit.interval.ms": 1_000}
        )
        consumer.subscribe(["steady"])
        quiet = time.monotonic()
        while not self.stop.is_set() or (len(self.read) < len(self.acked) and time.monotonic() - quiet < 30):
            message = consumer.poll(0.2)
            if message is None:
                continue
            if message.error():
                self.errors.append(f"consume: {message.error()}")
                continue
            quiet = time.monotonic()
            place = (message.partition(), message.offset())
            if place in self.read:
                self.errors.append(f"{place} was read twice")
            self.read[place] = message.value()
        consumer.close()

    def finish(self):
        self.stop.set()
        for thread in self.threads:
            thread.join(120)
        lost = [p for p, v in self.acked.items() if self.read.get(p) != v]
        if lost:
            self.errors.append(f"{len(lost)} of {len(self.acked)} acknowledged records were not read: {lost[:5]}")
        values = {}
        for place in sorted(self.read):
            number = int(self.read[place])
            if values.get(place[0], -1) >= number:
                self.errors.append(f"{place} is out of order")
            values[place[0]] = number


def status(pid, name):
    with open(f"/proc/{pid}/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--memory", default="256MiB")
    parser.add_argument("--memory-max", type=int, default=600, help="MiB of the process")
    parser.add_argument("--binary", default=ROOT / "target/release/millrace")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    port, folder = free_port(), tempfile.mkdtemp(prefix="millrace-abuse-")
    log_path = pathlib.Path(folder) / "log"
    command = [options.binary, "serve", "--data-dir", f"{folder}/data", "--kafka-listen", f"127.0.0.1:{port}", "--memory", options.memory]
    with open(log_path, "w") as log:
        broker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=clean_environment())
    if "ready" not in broker.stdout.readline():
        sys.exit(log_path.read_text())
    admin = AdminClient({"bootstrap.servers": f"127.0.0.1:{port}"})
    admin.create_topics([NewTopic("steady", PARTITIONS), NewTopic("bombs", 1)])["steady"].result(20)
    steady = Steady(f"127.0.0.1:{port}")
    rng = random.Random(options.seed)
    abuse = Abuse(port, rng)
    failures = []
    print(f"{'min':>4} {'acked':>8} {'p50 ms':>7} {'p99 ms':>7} {'max ms':>8} {'RSS MiB':>8} {'peak':>6} {'files':>6} {'log lines':>9}", flush=True)
    begin = minute = time.monotonic()
    done = {}
    while time.monotonic() - begin < 60 * options.minutes and not failures:
        kind = rng.choice(abuse.kinds)
        done[kind.__name__] = done.get(kind.__name__, 0) + 1
        try:
            kind()
        except OSError as error:
            print(f"     {kind.__name__}: {error}", flush=True)
        if broker.poll() is not None:
            failures.append(f"the broker ended with {broker.returncode} after {kind.__name__}")
            break
        if time.monotonic() - minute >= 60:
            minute = time.monotonic()
            waits, steady.waits = sorted(steady.waits), []
            share = lambda q: 1e3 * waits[min(len(waits) - 1, int(q * len(waits)))] if waits else float("nan")
            rss, peak = status(broker.pid, "VmRSS") >> 10, status(broker.pid, "VmHWM") >> 10
            files, lines = len(os.listdir(f"/proc/{broker.pid}/fd")), log_path.read_text().count("\n")
            passed = round((minute - begin) / 60)
            print(
                f"{passed:>4} {len(steady.acked):>8} {share(0.5):>7.2f} {share(0.99):>7.1f} {share(1):>8.1f} "
                f"{rss:>8} {peak:>6} {files:>6} {lines:>9}",
                flush=True,
            )
            if peak > options.memory_max:
                failures.append(f"the broker took {peak} MiB")
    steady.finish()
    failures += steady.errors[:10]
    print(" ".join(f"{name[3:]}={count}" for name, count in sorted(done.items())))
    if broker.poll() is None:
        broker.terminate()
        if broker.wait(60) != 0:
            failures.append(f"the broker ended with {broker.returncode} when it was told to")
    if failures:
        print(f"failed, data and log in {folder}:", *failures, sep="\n  ")
        sys.exit(1)
    subprocess.run(["rm", "-rf", folder], check=True)
    print(f"{len(steady.acked)} records acknowledged, each read once and in order")


if __name__ == "__main__":
    main()
