"""The main job, end to end: a real corpus in with kcat, the broker killed half-way, two members of a group read it back."""

import collections
import gzip
import pathlib
import subprocess
import threading
import time

from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

CORPUS = pathlib.Path("/usr/share/dictd/gcide.dict.dz")  # Debian: dict-gcide
KEYS = 61
CHUNK = 5_000  # lines


def corpus_lines():
    # Latin-1 bytes appear in it; lines are compared as bytes.
    return gzip.open(CORPUS, "rb").read().split(b"\n")[:-1]


def feed(stdin, lines, killed):
    """Gives kcat the lines; the last third only after the kill, which so comes while kcat is producing, however fast it is."""
    held = len(lines) * 2 // 3
    with stdin:
        for begin in range(0, len(lines), CHUNK):
            if begin >= held:
                killed.wait()
            chunk = enumerate(lines[begin:begin + CHUNK], begin)
            stdin.write(b"".join(b"%d\t%d:%s\n" % (number % KEYS, number, line) for number, line in chunk))


def test_a_corpus_survives_a_kill_and_is_read_once_in_order_per_key(make_broker):
    lines = corpus_lines()
    assert len(lines) >= 1_000_000
    broker = make_broker()
    topic = "corpus"
    admin = AdminClient({"bootstrap.servers": broker.bootstrap})
    admin.create_topics([NewTopic(topic, 8)])[topic].result(10)
    producer = subprocess.Popen(
        ["kcat", "-E", "-P", "-b", broker.bootstrap, "-t", topic, "-K", "\t", "-X", "acks=all",
         "-X", "enable.idempotence=true", "-X", "message.timeout.ms=120000", "-X", "reconnect.backoff.max.ms=200"],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    killed = threading.Event()
    threading.Thread(target=feed, args=(producer.stdin, lines, killed), daemon=True).start()
    wait_for_records(broker, topic, len(lines) // 3)
    assert producer.poll() is None, producer.stderr.read()
    broker.kill()
    killed.set()
    killed_at = time.monotonic()
    broker.start()
    print(f"killed and serving again after {time.monotonic() - killed_at:.3f} s")
    errors = producer.stderr.read()
    producer.wait(timeout=180)
    assert producer.returncode == 0, errors
    assert b"Delivery failed" not in errors, errors

    assert records_in(broker, topic) == len(lines), "each line is in the log exactly once"
    expected = collections.defaultdict(list)
    for number, line in enumerate(lines):
        expected[b"%d" % (number % KEYS)].append(b"%d:%s" % (number, line))
    got = read_with_group(broker, topic, len(lines))
    for key, values in expected.items():
        assert got[key] == values, f"key {key!r}: {len(got[key])} of {len(values)}, or out of order"
    assert broker.stop() == 0


def records_in(broker, topic):
    consumer = Consumer({"bootstrap.servers": broker.bootstrap, "group.id": "watch"})
    total = sum(consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=10)[1] for p in range(8))
    consumer.close()
    return total


def wait_for_records(broker, topic, count):
    until = time.monotonic() + 120
    while (total := records_in(broker, topic)) < count:
        assert time.monotonic() < until, f"only {total} records arrived"
        time.sleep(0.02)


def read_with_group(broker, topic, count):
    got = collections.defaultdict(list)
    lock = threading.Lock()
    total = [0]
    members = [0, 0]
    until = time.monotonic() + 240

    def member(index):
        consumer = Consumer({
            "bootstrap.servers": broker.bootstrap, "group.id": "readers", "auto.offset.reset": "earliest",
            "session.timeout.ms": 10000, "enable.auto.commit": False,
        })
        consumer.subscribe([topic])
        while total[0] < count and time.monotonic() < until:
            messages = consumer.consume(5000, 0.3)
            with lock:
                for message in messages:
                    assert message.error() is None, message.error()
                    got[message.key()].append(message.value())
                total[0] += len(messages)
                members[index] += len(messages)
            if messages:
                consumer.commit(asynchronous=False)
        consumer.close()

    # The second joins before the first has been assigned anything, so that both take part from the start.
    threads = [threading.Thread(target=member, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A rebalance between reading and committing may give records twice; within a key they then repeat in order.
    for key, values in got.items():
        seen = set()
        got[key] = [v for v in values if not (v in seen or seen.add(v))]
    assert all(members), f"both members read: {members}"
    return got
