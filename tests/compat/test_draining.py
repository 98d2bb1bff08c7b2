"""`millrace cluster drain`: what it refuses has changed nothing, and it says what is missing and what comes next."""

import subprocess

import pytest
from cluster import voters
from conftest import BINARY
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic, ResourceType


def refused(cluster, *arguments):
    live = ",".join(f"127.0.0.1:{n.port}" for n in cluster.nodes if n.process.poll() is None)
    command = [BINARY, "cluster", *map(str, arguments), "--bootstrap", live]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr


def test_a_refused_drain_leaves_the_node_as_it_was(make_cluster):
    cluster = make_cluster()
    cluster.create("t")
    assert "on every node that is up: add a node first" in refused(cluster, "drain", 3)
    cluster.create("after", 3)
    assert {n for p in cluster.partitions("after").values() for n in p.replicas} == {1, 2, 3}
    assert "is not in this cluster" in refused(cluster, "drain", 9)

    # One that is being drained is named where it is missing.
    admin = cluster.admin()
    for future in admin.incremental_alter_configs([draining(3)]).values():
        future.result(10)
    with pytest.raises(Exception, match="Broker 3 is being drained.*drain 3 --undo"):
        cluster.create("short", 1)
    cluster.command("drain", 3, "--undo")
    cluster.create("short", 1)


def draining(node):
    entry = ConfigEntry("broker.draining", "true", incremental_operation=AlterConfigOpType.SET)
    return ConfigResource(ResourceType.BROKER, str(node), incremental_configs=[entry])


def test_the_only_copies_of_a_dead_node_are_named_and_the_rest_is_moved(make_cluster):
    cluster = make_cluster()
    cluster.create("t")
    cluster.add_node()
    admin = cluster.admin()
    admin.create_topics([NewTopic("single", 3, replica_assignment=[[3], [3], [4]])])["single"].result(10)
    cluster.node(3).kill()
    cluster.wait("nobody is told of it", lambda: 3 not in admin.list_topics(timeout=20).brokers)
    told = refused(cluster, "drain", 3)
    assert "single-0, single-1" in told and "single-2" not in told and "Start the nodes that hold" in told, told
    assert any(3 in p.replicas for p in cluster.partitions("t").values()), "nothing was begun"
    admin.delete_topics(["single"])["single"].result(10)
    done = cluster.command("drain", 3)
    assert "node 3 votes no more" in done and "holds nothing any more" in done, done
    assert {n for p in cluster.partitions("t").values() for n in p.replicas} == {1, 2, 4}
    assert "is forgotten" in cluster.command("remove-node", 3)


def test_a_drain_that_leaves_an_even_number_of_voters_says_so(make_cluster):
    cluster = make_cluster(settings={"default.replication.factor": 1, "min.insync.replicas": 1})
    cluster.create("t", replicas=1)
    done = cluster.command("drain", 3)
    assert "2 voters are left: 0 of them may fail" in done and "add-node" in done, done
    assert sum(len(v) for role, v in voters(cluster).items() if role != "Observer") == 2


def test_cores_that_clients_see_as_brokers_are_their_node_to_the_commands(make_cluster):
    settings = {"core.endpoints": "true", "default.replication.factor": 2, "min.insync.replicas": 1}
    cluster = make_cluster(settings=settings, cores=2)
    cluster.create("t", replicas=2)
    told = AdminClient({"bootstrap.servers": f"127.0.0.1:{cluster.node(3).port}"}).list_topics("t", timeout=20)
    assert 100_003 in told.brokers
    producer = Producer({"bootstrap.servers": cluster.bootstrap})
    for number in range(600):
        producer.produce("t", str(number), partition=number % 6)
    assert producer.flush(20) == 0

    held = sum(3 in [n % 100_000 for n in p.replicas] for p in told.topics["t"].partitions.values())
    lines = {line.split()[0]: line.split() for line in cluster.command("status").splitlines()[2:5]}
    assert sorted(lines) == ["1", "2", "3"] and int(lines["3"][-1]) == held > 0, lines
    # A core's id names its node wherever a request names a broker.
    admin = cluster.admin()
    admin.create_topics([NewTopic("by-hand", 1, replica_assignment=[[100_003, 100_001]])])["by-hand"].result(10)
    cluster.wait_in_sync("by-hand", count=2)

    done = cluster.command("drain", 3)
    assert "holds nothing any more" in done, done
    replicas = {n % 100_000 for t in ("t", "by-hand") for p in cluster.partitions(t).values() for n in p.replicas}
    assert replicas == {1, 2}
