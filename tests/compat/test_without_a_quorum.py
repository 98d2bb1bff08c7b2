"""Two of three nodes are gone: what the third leads can still be read, and nobody waits for a quorum that cannot come."""

import threading
import time

import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

RECORDS = 100


@pytest.fixture
def survivor(make_cluster):
    cluster = make_cluster()
    cluster.create("t")
    cluster.wait_in_sync("t")
    producer = Producer({"bootstrap.servers": cluster.bootstrap})
    for number in range(RECORDS):
        for partition in range(6):
            producer.produce("t", str(number), partition=partition)
    assert producer.flush(20) == 0
    # A connection that has stood for a second tells of a death.
    time.sleep(1.2)
    led = next(p for p, about in cluster.partitions("t").items() if about.leader == 1)
    cluster.node(2).kill()
    cluster.node(3).kill()
    # As long as an election may take the node waits for one.
    time.sleep(3)
    return cluster, f"127.0.0.1:{cluster.node(1).port}", led


def new_client(bootstrap):
    return AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})


def seconds(act):
    began = time.monotonic()
    act()
    return time.monotonic() - began


def test_clients_are_told_what_the_living_node_knows_and_read_what_it_leads(survivor):
    cluster, bootstrap, led = survivor

    def look(topic=None):
        assert "t" in new_client(bootstrap).list_topics(topic, timeout=20).topics

    assert seconds(look) < 1, "all topics"
    assert seconds(lambda: look("t")) < 1, "a topic"

    waits = []
    many = [threading.Thread(target=lambda: waits.append(seconds(look))) for _ in range(12)]
    for thread in many:
        thread.start()
    for thread in many:
        thread.join()
    assert len(waits) == 12 and max(waits) < 2, "clients do not queue up behind each other"

    def read():
        consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "g", "enable.auto.commit": False, "log_level": 0})
        consumer.assign([TopicPartition("t", led, 0)])
        records = 0
        while records < RECORDS:
            messages = consumer.consume(RECORDS - records, 20)
            assert messages, f"{records} of {RECORDS}"
            records += sum(not m.error() for m in messages)
        consumer.close()

    assert seconds(read) < 3

    # There is no topic for offsets yet, and none can be made; so there is no topic that a client names for the first time.
    def refused(act):
        with pytest.raises(KafkaException):
            act()

    create = new_client(bootstrap).create_topics([NewTopic("new", 1, 1)], request_timeout=10)["new"]
    assert seconds(lambda: refused(lambda: create.result(15))) < 3, "a change is refused, and the client may try again"
    auto = Producer({"bootstrap.servers": bootstrap, "log_level": 0})
    assert seconds(lambda: auto.list_topics("unheard-of", timeout=20)) < 2, "a topic that would be made"

    # When there is a quorum again, whoever comes is told what it says.
    cluster.node(2).launch().wait_ready()
    cluster.create("after", partitions=1, replicas=1)
    assert "after" in new_client(bootstrap).list_topics(timeout=20).topics
