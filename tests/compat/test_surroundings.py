"""What is around one broker fails."""

import os
import subprocess

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from conftest import BINARY, clean_environment


def write_and_read(broker, count=1000):
    producer = Producer({"bootstrap.servers": broker.bootstrap, "message.timeout.ms": 10_000})
    failed = []
    for number in range(count):
        producer.produce("t", str(number).encode(), partition=0, on_delivery=lambda e, m: e and failed.append(e))
    assert producer.flush(15) == 0 and not failed
    consumer = Consumer({"bootstrap.servers": broker.bootstrap, "group.id": "g"})
    consumer.assign([TopicPartition("t", 0, 0)])
    found = consumer.consume(count, 10)
    consumer.close()
    assert [m.value() for m in found if not m.error()] == [str(n).encode() for n in range(count)]


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


def test_a_command_whose_answer_is_not_wanted_or_cannot_be_kept():
    wanted = subprocess.run(f"{BINARY} settings | head -1", shell=True, capture_output=True, text=True)
    assert wanted.stdout == "# broker settings\n" and not wanted.stderr
    with open("/dev/full", "w") as full:
        kept = subprocess.run([BINARY, "settings"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert kept.returncode == 1 and kept.stderr == "millrace: cannot print: No space left on device (os error 28)\n"
