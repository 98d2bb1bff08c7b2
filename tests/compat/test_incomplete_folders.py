"""A data folder of which a part is gone: the broker says which, and what to do, and does not start without it."""

import shutil
import subprocess
import threading

import pytest
from conftest import BINARY, clean_environment
from confluent_kafka import Consumer, Producer, TopicPartition

RECORDS = 50


@pytest.fixture
def killed(make_broker):
    """A lone broker that was killed: its journal alone has what it acknowledged last."""
    broker = make_broker()
    producer = Producer({"bootstrap.servers": broker.bootstrap})
    for number in range(RECORDS):
        producer.produce("t", str(number), partition=0)
    assert producer.flush(20) == 0
    broker.kill()
    return broker


def refusal(broker):
    # One that neither starts nor ends would be waited for.
    impatience = threading.Timer(15, lambda: broker.process.kill())
    impatience.start()
    with pytest.raises(RuntimeError) as refused:
        broker.start()
    impatience.cancel()
    assert broker.process.returncode == 1
    return str(refused.value)


@pytest.mark.parametrize(
    ("gone", "named"),
    [("journal", "journal/0000-0000.journal"), ("checkpoint", "checkpoint"), ("millrace.identity", "millrace.identity")],
)
def test_what_is_gone_is_named(killed, tmp_path, gone, named):
    at = f"{killed.data_dir}/{gone}"
    shutil.move(at, tmp_path / "kept")
    text = refusal(killed)
    assert f"{killed.data_dir}/{named} is missing" in text, text
    assert "a copy" in text, text

    # Nothing was made of what is left that would be in the way now.
    if gone != "millrace.identity":
        shutil.rmtree(at, ignore_errors=True)
    shutil.move(tmp_path / "kept", at)
    killed.start()
    consumer = Consumer({"bootstrap.servers": killed.bootstrap, "group.id": "g", "enable.auto.commit": False})
    consumer.assign([TopicPartition("t", 0, 0)])
    assert len(consumer.consume(RECORDS, 20)) == RECORDS
    consumer.close()


def test_records_are_saved_without_checkpoints(killed, tmp_path):
    shutil.rmtree(f"{killed.data_dir}/checkpoint")
    refusal(killed)
    exported = subprocess.run(
        [BINARY, "export", "--data-dir", killed.data_dir, "--to", tmp_path / "saved"], capture_output=True, text=True, env=clean_environment()
    )
    assert f"{RECORDS} records" in exported.stdout, exported
