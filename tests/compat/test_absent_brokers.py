"""A broker that is away for a moment still counts: replicas are placed on it, and topics that came short get them later."""

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic


def commit(bootstrap, group, offset=1):
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": group})
    try:
        return consumer.commit(offsets=[TopicPartition("t", 0, offset)], asynchronous=False)
    finally:
        consumer.close()


def test_topics_are_made_and_grow_while_one_of_three_nodes_is_down(make_cluster):
    cluster = make_cluster()
    cluster.create("t", 3)
    cluster.node(3).kill()
    cluster.wait("it is fenced", lambda: all(3 not in p.isrs for p in cluster.partitions("t").values()))
    live = f"127.0.0.1:{cluster.node(1).port},127.0.0.1:{cluster.node(2).port}"
    admin = AdminClient({"bootstrap.servers": live})
    asked = [NewTopic("counted", 4, 3), NewTopic("default", 4), NewTopic("by-hand", 1, replica_assignment=[[3, 1, 2]])]
    for future in admin.create_topics(asked).values():
        future.result(15)
    admin.create_partitions([NewPartitions("t", 5)])["t"].result(15)
    producer = Producer({"bootstrap.servers": live, "acks": "all"})
    errors = []
    for topic in ("counted", "default", "by-hand", "t", "made-by-a-producer"):
        producer.produce(topic, b"v", on_delivery=lambda e, m: e and errors.append(str(e)))
    assert producer.flush(20) == 0 and not errors, errors
    commit(live, "first")

    for topic in ("counted", "default", "by-hand", "t", "made-by-a-producer", "__consumer_offsets"):
        for partition in cluster.partitions(topic).values():
            assert sorted(partition.replicas) == [1, 2, 3], (topic, partition.replicas)
            assert sorted(partition.isrs) == [1, 2] and partition.leader in (1, 2)
    cluster.node(3).launch().wait_ready()
    for topic in ("counted", "default", "by-hand", "t", "made-by-a-producer", "__consumer_offsets"):
        cluster.wait_in_sync(topic)

    # The node that was away serves what was made meanwhile, groups too.
    cluster.node(2).kill()
    cluster.wait("it is fenced", lambda: all(2 not in p.isrs for p in cluster.partitions("t").values()))
    live = f"127.0.0.1:{cluster.node(1).port},127.0.0.1:{cluster.node(3).port}"
    for number in range(8):
        commit(live, f"group-{number}")


def test_a_topic_needs_one_broker_that_is_up(make_cluster):
    cluster = make_cluster()
    cluster.create("t", 1)
    cluster.node(3).kill()
    cluster.wait("it is fenced", lambda: all(3 not in p.isrs for p in cluster.partitions("t").values()))
    admin = AdminClient({"bootstrap.servers": f"127.0.0.1:{cluster.node(1).port}"})
    with pytest.raises(Exception, match="fenced"):
        admin.create_topics([NewTopic("away", 1, replica_assignment=[[3]])])["away"].result(15)
    with pytest.raises(Exception, match="only 3 broker.* are registered, 2 of them active"):
        admin.create_topics([NewTopic("many", 1, 4)])["many"].result(15)


def test_the_offsets_topic_gets_the_replicas_that_it_lacks(make_cluster):
    settings = {"default.replication.factor": 1, "min.insync.replicas": 1, "offsets.topic.num.partitions": 4}
    cluster = make_cluster(count=1, settings=settings)
    cluster.create("t", 1, replicas=1)
    commit(cluster.bootstrap, "early", offset=7)
    assert {len(p.replicas) for p in cluster.partitions("__consumer_offsets").values()} == {1}
    cluster.add_node()
    cluster.add_node()
    cluster.wait_in_sync("__consumer_offsets", count=3)
    # The other topics are what they were asked to be.
    assert {len(p.replicas) for p in cluster.partitions("t").values()} == {1}

    cluster.node(1).kill()
    live = f"127.0.0.1:{cluster.node(2).port},127.0.0.1:{cluster.node(3).port}"
    consumer = Consumer({"bootstrap.servers": live, "group.id": "early"})
    assert consumer.committed([TopicPartition("t", 0)], timeout=20)[0].offset == 7
    consumer.close()
