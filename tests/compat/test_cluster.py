"""Three nodes: they form, and go on when some of them are killed, paused or restarted under load."""

import collections
import os
import re
import signal
import socket
import struct
import subprocess
import time

import pytest
from cluster import PARTITIONS, Load
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from conftest import BINARY
from test_java_tools import TOOLS, run


def test_three_nodes_started_at_once_form_a_cluster(make_cluster):
    cluster = make_cluster()
    cluster.create("t")
    described = []
    for node in cluster.nodes:
        admin = AdminClient({"bootstrap.servers": f"127.0.0.1:{node.port}"})
        found = admin.list_topics("t", timeout=10)
        described.append((found.cluster_id, sorted(found.brokers), len(found.topics["t"].partitions)))
    assert described == [described[0]] * 3
    assert described[0][1:] == ([1, 2, 3], PARTITIONS)
    leaders = collections.Counter(p.leader for p in cluster.partitions("t").values())
    assert sorted(leaders) == [1, 2, 3], "leaders are spread"


def test_a_topic_is_there_on_every_node_as_soon_as_its_creation_is_answered(make_cluster):
    cluster = make_cluster()
    connections = [socket.create_connection(("127.0.0.1", n.port)) for n in cluster.nodes]

    def ask(connection, body):
        connection.sendall(struct.pack(">i", len(body)) + body)
        answer = connection.makefile("rb")
        return answer.read(struct.unpack(">i", answer.read(4))[0])

    def text(value):
        return struct.pack(">h", len(value)) + value

    slow = 0
    for number in range(200):
        name = b"t%d" % number
        # CreateTopics 2: one partition of three replicas; Metadata 4 without creation.
        create = struct.pack(">hhihi", 19, 2, number, -1, 1) + text(name) + struct.pack(">ihiiib", 1, 3, 0, 0, 10_000, 0)
        known = struct.pack(">hhihi", 3, 4, number, -1, 1) + text(name) + b"\0"
        created = ask(connections[number % 3], create)
        # No error, and no text.
        assert created.endswith(text(name) + b"\0\0\xff\xff"), created
        for connection in connections:
            begun = time.monotonic()
            found = ask(connection, known)
            slow += time.monotonic() - begun > 0.2
            place = found.index(text(name))
            assert found[place - 2 : place] == b"\0\0", f"topic {number} is not known: {found}"
    assert slow < 10
    # What is nowhere is said to be nowhere.
    nowhere = struct.pack(">hhihi", 3, 4, 1, -1, 1) + text(b"nowhere") + b"\0"
    assert struct.pack(">h", 3) + text(b"nowhere") in ask(connections[1], nowhere)


def test_a_killed_leader_is_followed_by_another_and_nothing_is_lost(make_cluster):
    cluster = make_cluster()
    cluster.create("t")
    load = Load(cluster, "t")
    for _ in range(3):
        time.sleep(1)
        victim = cluster.node(cluster.partitions("t")[0].leader)
        victim.kill()
        cluster.wait(
            "another leads",
            lambda: all(p.leader not in (-1, victim.number) for p in cluster.partitions("t").values()),
            10,
        )
        time.sleep(0.5)
        victim.launch().wait_ready()
        cluster.wait_in_sync("t")
    assert load.finish() > 2_000
    # Generous: a debug build, and everything on the same cores.
    assert load.longest_gap < 6, f"no acknowledgement for {load.longest_gap:.1f} s"


def test_who_comes_after_a_kill_is_told_who_leads(make_cluster):
    cluster = make_cluster()
    cluster.create("t", partitions=12)
    for _ in range(4):
        victim = cluster.node(cluster.partitions("t")[0].leader)
        others = [n for n in cluster.nodes if n is not victim]
        victim.kill()
        until = time.monotonic() + 1
        while time.monotonic() < until:
            for node in others:
                told = AdminClient({"bootstrap.servers": f"127.0.0.1:{node.port}"}).list_topics("t", timeout=20)
                leaders = {p.leader for p in told.topics["t"].partitions.values()}
                # Nobody is missing; in the first moments the dead one may still be named.
                assert leaders <= told.brokers.keys(), f"{leaders} of {told.brokers.keys()}"
        assert victim.number not in leaders
        victim.launch().wait_ready()
        cluster.wait_in_sync("t")


def test_a_paused_node_is_fenced_and_comes_back(make_cluster):
    cluster = make_cluster()
    cluster.create("t")
    load = Load(cluster, "t")
    for number in (1, 2, 3):
        node = cluster.node(number)
        time.sleep(0.7)
        node.signal(signal.SIGSTOP)
        time.sleep(2.5)
        node.signal(signal.SIGCONT)
        cluster.wait_in_sync("t")
    assert load.finish() > 2_000


def test_all_nodes_killed_at_once_lose_nothing(make_cluster):
    cluster = make_cluster()
    cluster.create("t")
    load = Load(cluster, "t")
    for _ in range(2):
        time.sleep(1.5)
        for node in cluster.nodes:
            node.signal(signal.SIGKILL)
        for node in cluster.nodes:
            node.process.wait(30)
        cluster.start_all()
    cluster.wait_in_sync("t")
    time.sleep(1)
    assert load.finish() > 1_000


def test_a_rolling_restart_fails_no_request(make_cluster):
    # Two shards each: leaders' shards find followers' shards.
    cluster = make_cluster(cores=2)
    cluster.create("t")
    load = Load(cluster, "t")
    for node in cluster.nodes:
        time.sleep(0.5)
        node.signal(signal.SIGTERM)
        assert node.process.wait(30) == 0, node.log_text()
        node.launch().wait_ready()
        cluster.wait_in_sync("t")
    assert load.finish() > 1_000


def test_a_group_goes_on_with_its_offsets_when_its_coordinator_is_killed(make_cluster):
    cluster = make_cluster()
    cluster.create("t")
    load = Load(cluster, "t", pause=0.01)
    consumer = Consumer(
        {
            "bootstrap.servers": cluster.bootstrap,
            "group.id": "g",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "session.timeout.ms": 10_000,
            "reconnect.backoff.max.ms": 200,
        }
    )
    rebalances = []
    consumer.subscribe(["t"], on_assign=lambda _, partitions: rebalances.append(len(partitions)))
    committed = {}

    def work(seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            messages = [m for m in consumer.consume(200, 0.2) if not m.error()]
            if not messages:
                continue
            try:
                for tp in consumer.commit(asynchronous=False):
                    if tp.error is None:
                        committed[tp.partition] = tp.offset
            except KafkaException:
                pass  # The coordinator is moving; what counts is what was answered.

    work(4)
    assert committed
    found = subprocess.run(
        ["kcat", "-b", cluster.bootstrap, "-L", "-t", "__consumer_offsets"], capture_output=True, text=True, check=True
    )
    # The group's partition: Kafka's hash of its name.
    leaders = dict(re.findall(r"partition (\d+), leader (\d+)", found.stdout))
    coordinator = cluster.node(int(leaders[str(ord("g") % 50)]))
    coordinator.kill()
    work(6)
    asked = consumer.committed([TopicPartition("t", p) for p in range(PARTITIONS)], timeout=20)
    back = {tp.partition: (tp.offset, committed.get(tp.partition, 0)) for tp in asked}
    assert all(now >= before for now, before in back.values()), back
    assert rebalances == [PARTITIONS], "its member was not made to join again"
    coordinator.launch().wait_ready()
    consumer.close()
    load.finish()


@pytest.mark.skipif("MILLRACE_TEST_PREVIOUS" not in os.environ, reason="needs the build of tests/compat/upgrade-from")
def test_an_upgrade_rolls_from_the_previous_build_under_load(make_cluster):
    cluster = make_cluster(start=False)
    for node in cluster.nodes:
        node.binary = os.environ["MILLRACE_TEST_PREVIOUS"]
    cluster.start_all()
    cluster.create("t")
    load = Load(cluster, "t")
    committed = Consumer({"bootstrap.servers": cluster.bootstrap, "group.id": "g"})
    committed.commit(offsets=[TopicPartition("t", p, p) for p in range(PARTITIONS)], asynchronous=False)
    for node in cluster.nodes:
        time.sleep(0.5)
        node.signal(signal.SIGTERM)
        assert node.process.wait(30) == 0, node.log_text()
        node.binary = BINARY
        node.launch().wait_ready()
        cluster.wait_in_sync("t")
    assert load.finish() > 1_000
    until, found = time.monotonic() + 20, []
    while not found:
        try:
            found = committed.committed([TopicPartition("t", p) for p in range(PARTITIONS)], timeout=20)
        except KafkaException as error:
            # It asks the coordinator that it knew, and leaves it to its caller to ask the next one.
            assert error.args[0].code() == KafkaError.NOT_COORDINATOR and time.monotonic() < until, error
    assert [tp.offset for tp in found] == list(range(PARTITIONS))
    # Now that every node knows it, the feature level may be raised; here it is the highest already.
    server = ["--bootstrap-server", cluster.bootstrap]
    shown = run(TOOLS + "FeatureCommand", *server, "describe")
    assert re.search(r"millrace.version.*FinalizedVersionLevel: 1", shown), shown
    admin_says = run(TOOLS + "FeatureCommand", *server, "upgrade", "--feature", "millrace.version=9", check=False)
    assert "upgrade it first" in admin_says, admin_says
