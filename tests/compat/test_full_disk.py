"""A disk without any room left: the broker starts on it, and its owner can delete what fills it."""

import os
import shutil
import subprocess
import time

import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from test_cluster_surroundings import loop_mounts_can_be_made

pytestmark = pytest.mark.skipif(not loop_mounts_can_be_made(), reason="needs root and loop devices")

KEPT_FREE = 30_000_000


@pytest.fixture
def small_disk(tmp_path):
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    subprocess.run(["truncate", "-s", "200M", image], check=True)
    subprocess.run(["mkfs.ext4", "-qF", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mount], check=True)
    yield mount
    subprocess.run(["umount", mount], check=True)


def fill(mount, leave=0):
    """Takes all that is free but this, and waits until a broker has noticed: it looks once a second."""
    name = mount / f"filler-{len(list(mount.iterdir()))}"
    with open(name, "wb", 0) as file:
        left = shutil.disk_usage(mount).free - leave
        if leave:
            os.posix_fallocate(file.fileno(), 0, left)
        for piece in () if leave else (1 << 20, 4096):
            try:
                while True:
                    file.write(bytes(piece))
            except OSError:
                pass
    time.sleep(1.2)


def produce(bootstrap, topic, megabytes):
    producer = Producer({"bootstrap.servers": bootstrap, "message.timeout.ms": 3_000, "log_level": 0, "linger.ms": 0})
    failed = []
    for _ in range(megabytes):
        producer.produce(topic, bytes(1_000_000 - 200), on_delivery=lambda error, _: failed.append(error) if error else None)
        producer.poll(0)
    assert producer.flush(30) == 0
    return len(failed)


def commit(bootstrap, offset):
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "g", "log_level": 0})
    try:
        consumer.commit(offsets=[TopicPartition("a", 0, offset)], asynchronous=False)
        (found,) = consumer.committed([TopicPartition("a", 0)], 10)
        return found.offset
    finally:
        consumer.close()


def test_a_broker_starts_on_a_full_disk_and_topics_are_deleted_to_free_it(small_disk, make_broker):
    settings = {"cores": "1", "journal.bytes": "33554432", "disk.free.bytes.min": str(KEPT_FREE)}
    broker = make_broker(data_dir=str(small_disk / "data"), settings=settings, args=["--memory", "256MiB"])
    admin = AdminClient({"bootstrap.servers": broker.bootstrap, "log_level": 0})
    for created in admin.create_topics([NewTopic(t, 1, 1, config={"segment.bytes": "16000000"}) for t in "ab"]).values():
        created.result(10)
    assert produce(broker.bootstrap, "a", 50) == 0
    assert commit(broker.bootstrap, 5) == 5

    fill(small_disk, leave=KEPT_FREE // 2)
    assert produce(broker.bootstrap, "b", 1) == 1, "clients' records leave some room"
    assert commit(broker.bootstrap, 7) == 7, "which is for what the broker itself notes"
    fill(small_disk)
    with pytest.raises(KafkaException):
        commit(broker.bootstrap, 9)

    # However it ends: it comes back.
    assert broker.stop() == 0, broker.log_text()
    fill(small_disk)
    broker.start()
    broker.kill()
    fill(small_disk)
    broker.start()
    assert shutil.disk_usage(small_disk).free < KEPT_FREE
    admin.delete_topics(["a"])["a"].result(20)
    for _ in range(30):
        if produce(broker.bootstrap, "b", 1) == 0:
            break
    else:
        pytest.fail("no room returned")
