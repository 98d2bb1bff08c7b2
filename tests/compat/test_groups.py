"""What a group coordinator answers has to be what its log says: the next one knows nothing else."""

import threading
import time

from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from test_python_clients import create, name

# Bytes of the note that goes with a commit: so many that the log is written anew every few commits of all partitions.
NOTE = 4000
PARTITIONS = 100
# Groups that are deleted meanwhile.
GOING = 3000
SECONDS = 8


def offsets_of(admin, groups):
    """What is committed for each group. Asks again while its coordinator is reading its log, as clients are to."""
    listed, rest, until = {}, set(groups), time.monotonic() + 60
    while rest:
        asked = {g: admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(g)])[g] for g in rest}
        for group, future in asked.items():
            try:
                listed[group] = future.result(30).topic_partitions
            except KafkaException as e:
                if e.args[0].name() != "COORDINATOR_LOAD_IN_PROGRESS" or time.monotonic() > until:
                    raise
        rest -= listed.keys()
    return {g: {(t.topic, t.partition): t.offset for t in offsets} for g, offsets in listed.items()}


def test_groups_are_after_a_restart_what_they_were(make_broker):
    broker = make_broker(settings={"offsets.topic.num.partitions": "1"})
    conf = {"bootstrap.servers": broker.bootstrap, "metadata.recovery.strategy": "none"}
    admin = AdminClient(conf)
    topic, stem = create(admin, PARTITIONS), name("g")
    going = [f"{stem}-going-{n}" for n in range(GOING)]
    groups, failed = set(going), []

    def many_bytes(number):
        group = f"{stem}-much-{number}"
        groups.add(group)
        consumer, offset = Consumer({**conf, "group.id": group}), 0
        while time.monotonic() < until:
            offset += 1
            offsets = [TopicPartition(topic, p, offset, "x" * NOTE) for p in range(PARTITIONS)]
            consumer.commit(offsets=offsets, asynchronous=False)
        consumer.close()

    def alter(group, offset):
        there = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, 0, offset)])
        admin.alter_consumer_group_offsets([there])[group].result(30)

    def delete(number):
        for group in going[number::4]:
            admin.delete_consumer_groups([group])[group].result(30)

    def commit_while_it_is_deleted(number):
        group, offset = f"{stem}-both-{number // 2}", 0
        groups.add(group)
        while time.monotonic() < until:
            offset += 1
            if number % 2:
                alter(group, offset)
                continue
            try:
                admin.delete_consumer_groups([group])[group].result(30)
            except KafkaException as e:
                assert e.args[0].name() == "GROUP_ID_NOT_FOUND", e

    def run(work, number):
        try:
            work(number)
        except BaseException as e:
            failed.append(f"{work.__name__} {number}: {e!r}")

    # What a snapshot holds, so that it is long in the making.
    for n in range(40):
        groups.add(f"{stem}-held-{n}")
        consumer = Consumer({**conf, "group.id": f"{stem}-held-{n}"})
        offsets = [TopicPartition(topic, p, n, "x" * NOTE) for p in range(PARTITIONS)]
        consumer.commit(offsets=offsets, asynchronous=False)
        consumer.close()
    there = [ConsumerGroupTopicPartitions(group, [TopicPartition(topic, 0, 1)]) for group in going]
    for future in [admin.alter_consumer_group_offsets([group])[group.group_id] for group in there]:
        future.result(30)
    until = time.monotonic() + SECONDS
    works = [(many_bytes, 4), (delete, 4), (commit_while_it_is_deleted, 4)]
    threads = [threading.Thread(target=run, args=(work, n)) for work, count in works for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    before = offsets_of(admin, groups)
    assert not any(before[group] for group in going)
    broker.kill()
    broker.start()
    after = offsets_of(admin, groups)
    differ = {g: (before[g], after[g]) for g in groups if before[g] != after[g]}
    assert not differ, differ
