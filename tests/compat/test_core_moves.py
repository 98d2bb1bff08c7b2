"""Partitions go from one core of a node to another while clients use them, and nothing is lost, doubled or out of order."""

import json
import random
import time

import pytest
from confluent_kafka import Consumer, Producer
from kafka import KafkaAdminClient
from kafka.structs import TopicPartitionReplica

from cluster import PARTITIONS, Load
from test_java_tools import LIB, TOOLS, run

CORES = 2


class Cores:
    """Where the partitions of one node are."""

    def __init__(self, cluster, node):
        self.cluster, self.number = cluster, node.number
        self.admin = KafkaAdminClient(bootstrap_servers=f"127.0.0.1:{node.port}")

    def dirs(self):
        [mine] = [d for d in self.admin.describe_log_dirs() if d["broker"] == self.number]
        return mine["log_dirs"]

    def placed(self, topic):
        """Partition to core, and what is on its way to where."""
        now, coming = {}, {}
        for core, folder in enumerate(self.dirs()):
            assert folder["log_dir"].endswith(f"#core-{core}"), folder
            for found in folder["topics"]:
                for partition in found["partitions"] if found["name"] == topic else ():
                    (coming if partition["is_future_key"] else now)[partition["partition_index"]] = core
        return now, coming

    def move(self, topic, targets):
        """Asks for moves; what each is answered."""
        names = [folder["log_dir"] for folder in self.dirs()]
        wanted = {TopicPartitionReplica(topic, p, self.number): names[core] for p, core in targets.items()}
        answers = self.admin.alter_replica_log_dirs(wanted)
        return {key.partition: answer.errno for key, answer in answers.items()}

    def move_and_wait(self, topic, targets):
        assert set(self.move(topic, targets).values()) == {0}

        def made():
            now, coming = self.placed(topic)
            return not coming and all(now[p] == core for p, core in targets.items())

        self.cluster.wait(f"{targets} on node {self.number}", made)


def alone(make_cluster, **settings):
    settings = {"default.replication.factor": 1, "min.insync.replicas": 1, **settings}
    return make_cluster(count=1, cores=CORES, settings=settings)


def test_partitions_of_one_node_move_under_load_and_a_kill(make_cluster):
    rng = random.Random(seed := random.randrange(1 << 32))
    print("seed", seed)
    cluster = alone(make_cluster)
    cluster.create("t", replicas=1)
    node = cluster.node(1)
    load = Load(cluster, "t")
    for _ in range(3):
        cores = Cores(cluster, node)
        for _ in range(6):
            cores.move_and_wait("t", {p: rng.randrange(CORES) for p in range(PARTITIONS)})
            time.sleep(rng.random() / 5)
        # One more is on its way when the power goes.
        cores.move("t", {p: rng.randrange(CORES) for p in range(PARTITIONS)})
        time.sleep(rng.random() / 50)
        node.kill()
        node.launch().wait_ready()
    assert load.finish() > 1_000
    assert "moved to another core" in node.log_text()


def test_leaders_and_followers_move_under_load_and_kills(make_cluster):
    rng = random.Random(seed := random.randrange(1 << 32))
    print("seed", seed)
    cluster = make_cluster(cores=CORES)
    cluster.create("t")
    cluster.wait_in_sync("t")
    load = Load(cluster, "t")
    for round in range(3):
        for node in cluster.nodes:
            cores = Cores(cluster, node)
            for _ in range(2):
                cores.move_and_wait("t", {p: rng.randrange(CORES) for p in range(PARTITIONS)})
        victim = cluster.nodes[round]
        Cores(cluster, victim).move("t", {p: rng.randrange(CORES) for p in range(PARTITIONS)})
        time.sleep(rng.random() / 20)
        victim.kill()
        victim.launch().wait_ready()
        cluster.wait_in_sync("t")
    assert load.finish() > 1_000


def test_a_moved_partition_stays_where_it_is_over_a_restart_and_keeps_its_producers(make_cluster):
    cluster = alone(make_cluster)
    cluster.create("t", 4, 1)
    node = cluster.node(1)
    cores = Cores(cluster, node)
    producer = Producer({"bootstrap.servers": cluster.bootstrap, "enable.idempotence": True, "linger.ms": 0})
    consumer = Consumer({"bootstrap.servers": cluster.bootstrap, "group.id": "g", "auto.offset.reset": "earliest"})
    consumer.subscribe(["t"])
    sent, got = 0, []
    for turn in range(4):
        for _ in range(50):
            producer.produce("t", str(sent).encode(), partition=0)
            sent += 1
        assert producer.flush(20) == 0
        cores.move_and_wait("t", {0: turn % 2})
        while len(got) < sent:
            message = consumer.poll(10)
            assert message is not None and not message.error(), message and message.error()
            got.append(int(message.value()))
    assert got == list(range(sent))
    consumer.close()
    before, _ = cores.placed("t")
    cores.move_and_wait("t", {p: 1 - core for p, core in before.items()})
    for stop in (node.kill, lambda: (node.process.terminate(), node.process.wait(30))):
        stop()
        node.launch().wait_ready()
        assert Cores(cluster, node).placed("t")[0] == {p: 1 - core for p, core in before.items()}


def test_a_core_with_more_to_do_than_the_other_hands_partitions_over_by_itself(make_cluster):
    cluster = alone(make_cluster, **{"core.imbalance.check.interval.seconds": 1})
    cluster.create("t", 8, 1)
    cores = Cores(cluster, cluster.node(1))
    busy = [p for p, core in cores.placed("t")[0].items() if core == 0]
    assert len(busy) == 4
    producer = Producer({"bootstrap.servers": cluster.bootstrap, "linger.ms": 0, "batch.size": 200_000})
    failed = []

    def shares():
        now, _ = cores.placed("t")
        return [sum(now[p] == core for p in busy) for core in range(CORES)]

    until = time.monotonic() + 60
    while shares() != [2, 2]:
        assert time.monotonic() < until, shares()
        for _ in range(20):
            for p in busy:
                producer.produce("t", bytes(100_000), partition=p, on_delivery=lambda e, _: e and failed.append(e))
            producer.poll(0.02)
    assert producer.flush(30) == 0 and not failed
    # That is even, and stays so.
    moves = cluster.node(1).log_text().count("moved to another core")
    assert moves == 2, cluster.node(1).log_text()


def test_what_cannot_be_moved_is_refused(make_cluster):
    cluster = alone(make_cluster)
    cluster.create("t", 1, 1)
    cores = Cores(cluster, cluster.node(1))
    consumer = Consumer({"bootstrap.servers": cluster.bootstrap, "group.id": "g"})
    consumer.subscribe(["t"])
    consumer.consume(1, 1)
    consumer.close()
    assert cores.move("t", {1: 0}) == {1: 3}, "no such partition"
    assert cores.move("__consumer_offsets", {0: 1}) == {0: 44}, "the coordinator's stays on its core"
    nowhere = {TopicPartitionReplica("t", 0, 1): "/nowhere"}
    assert [a.errno for a in cores.admin.alter_replica_log_dirs(nowhere).values()] == [57]


@pytest.mark.skipif(not LIB, reason="Kafka's tools are not installed")
def test_kafkas_own_tool_moves_partitions_between_cores(make_cluster, tmp_path):
    cluster = alone(make_cluster)
    cluster.create("t", 2, 1)
    cores = Cores(cluster, cluster.node(1))
    now, _ = cores.placed("t")
    names = [folder["log_dir"] for folder in cores.dirs()]
    plan = tmp_path / "plan.json"
    moves = [{"topic": "t", "partition": p, "replicas": [1], "log_dirs": [names[1 - core]]} for p, core in now.items()]
    plan.write_text(json.dumps({"version": 1, "partitions": moves}))
    tool = [TOOLS + "reassign.ReassignPartitionsCommand", "--bootstrap-server", cluster.bootstrap]
    tool += ["--reassignment-json-file", str(plan)]
    run(*tool, "--execute")
    done = "Reassignment of replica t-1-1 completed successfully"
    cluster.wait("the tool says so", lambda: done in run(*tool, "--verify"))
    assert cores.placed("t") == ({p: 1 - core for p, core in now.items()}, {})
