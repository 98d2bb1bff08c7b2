"""What is around one broker fails."""

import os
import resource
import socket
import subprocess

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from conftest import BINARY, clean_environment, fail_writes_beyond


def write(broker, count, size=0, timeout_ms=10_000):
    """The values that were acknowledged, in order, and the errors of the others."""
    producer = Producer({"bootstrap.servers": broker.bootstrap, "message.timeout.ms": timeout_ms})
    acked, failed = [], set()
    for number in range(count):
        value = str(number).zfill(size).encode()
        producer.produce("t", value, partition=0, on_delivery=lambda e, m: failed.add(e.name()) if e else acked.append(m.value()))
        producer.poll(0)
    assert producer.flush(30) == 0
    return acked, failed


def read(broker, count):
    consumer = Consumer({"bootstrap.servers": broker.bootstrap, "group.id": "g"})
    consumer.assign([TopicPartition("t", 0, 0)])
    found = consumer.consume(count, 20)
    consumer.close()
    return [m.value() for m in found if not m.error()]


def write_and_read(broker, count=1000):
    acked, failed = write(broker, count)
    assert len(acked) == count and not failed
    assert read(broker, count) == acked


# The journal fails; or the segment alone.
@pytest.mark.parametrize("position", [4096, 5 << 20])
def test_a_disk_that_fails_takes_nothing_that_was_acknowledged(make_broker, position):
    broker = make_broker(settings={"memory": "64MiB"})
    acked, failed = write(broker, 10_000, size=200)
    assert len(acked) == 10_000 and not failed
    fail_writes_beyond(broker.process, position)
    more, failed = write(broker, 10_000, size=2_000, timeout_ms=4_000)
    assert failed == {"_MSG_TIMED_OUT"}, "what is not on the disk is not acknowledged"
    acked += more
    assert read(broker, len(acked)) == acked, "what is there can be read"
    broker.kill()
    broker.start()
    assert read(broker, len(acked)) == acked
    after, failed = write(broker, 100)
    assert len(after) == 100 and not failed


def test_a_full_disk_behind_standard_error_is_not_the_brokers_end(make_broker):
    with open("/dev/full", "w") as full:
        broker = make_broker(stderr=full)
    write_and_read(broker)
    assert broker.stop() == 0


def test_a_log_that_nobody_reads_stops_nothing(make_broker):
    reads, writes = os.pipe()
    try:
        broker = make_broker(stderr=writes, env={**clean_environment(), "MILLRACE_LOG": "trace"})
        os.set_blocking(writes, False)
        with pytest.raises(BlockingIOError):
            for _ in range(1000):
                os.write(writes, b"x" * 4096)
        os.set_blocking(writes, True)
        write_and_read(broker)
        assert broker.stop() == 0
    finally:
        os.close(reads)
        os.close(writes)


def test_connections_do_not_take_the_files_of_logs(make_broker):
    few = (1024, 1024)
    broker = make_broker(settings={"memory": "64MiB"}, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, few))
    producer = Producer({"bootstrap.servers": broker.bootstrap, "message.timeout.ms": 30_000})
    producer.produce("t0", b"connected")
    assert producer.flush(10) == 0
    storm = [socket.create_connection(("127.0.0.1", broker.port)) for _ in range(1100)]
    try:
        # Enough for segments to be opened, of new topics too.
        acked, failed = [], set()
        for number in range(20_000):
            producer.produce(f"t{number % 20}", bytes(2_000), on_delivery=lambda e, m: failed.add(str(e)) if e else acked.append(m))
            producer.poll(0)
        assert producer.flush(40) == 0
        assert not failed and len(acked) == 20_000
        assert "offline" not in broker.log_text()
    finally:
        for connection in storm:
            connection.close()
    acked, failed = write(broker, 100)
    assert len(acked) == 100 and not failed


def test_a_command_whose_answer_is_not_wanted_or_cannot_be_kept():
    wanted = subprocess.run(f"{BINARY} settings | head -1", shell=True, capture_output=True, text=True)
    assert wanted.stdout == "# broker settings\n" and not wanted.stderr
    with open("/dev/full", "w") as full:
        kept = subprocess.run([BINARY, "settings"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert kept.returncode == 1 and kept.stderr == "millrace: cannot print: No space left on device (os error 28)\n"
