"""Nodes come back at other cluster addresses: pods, DHCP, restored machines."""

import signal

import pytest
from cluster import free_ports
from confluent_kafka import Producer


def produce(cluster, count=60):
    failed = []
    producer = Producer({"bootstrap.servers": cluster.bootstrap, "acks": "all"})
    for number in range(count):
        producer.produce("t", str(number), partition=number % 6, on_delivery=lambda e, m: e and failed.append(str(e)))
    assert producer.flush(20) == 0 and not failed, failed


def move(node):
    """Gives a node that is down another cluster address; the others' --peers keep the old one."""
    new, old = free_ports(1)[0], node.cluster_port
    node.cluster_port = new
    node.peers = node.peers.replace(f"{node.number}@127.0.0.1:{old}", f"{node.number}@127.0.0.1:{new}")
    return old, new


def leader_of_quorum(cluster):
    return next(int(line.split()[0]) for line in cluster.command("status").splitlines() if " leads " in line and line.split()[2] == "leads")


@pytest.mark.parametrize("which", ["a follower", "the leader"])
def test_a_node_that_moves_says_where_it_is(make_cluster, which):
    cluster = make_cluster(cores=2)
    cluster.create("t")
    produce(cluster)
    leader = leader_of_quorum(cluster)
    node = cluster.node(leader if which == "the leader" else leader % 3 + 1)
    node.signal(signal.SIGTERM)
    assert node.process.wait(30) == 0
    move(node)
    node.launch().wait_ready()
    cluster.wait_in_sync("t")
    produce(cluster)

    # Others that are started again with the old --peers find it where it registered.
    for other in [n for n in cluster.nodes if n is not node]:
        other.kill()
        other.launch().wait_ready()
        cluster.wait_in_sync("t")
    produce(cluster)


def test_all_nodes_move_at_once(make_cluster):
    cluster = make_cluster()
    cluster.create("t")
    produce(cluster)
    for node in cluster.nodes:
        node.kill()
    peers = cluster.peers
    for node in cluster.nodes:
        old, new = move(node)
        peers = peers.replace(f":{old}", f":{new}")
    for node in cluster.nodes:
        node.peers = peers
        node.launch()
    for node in cluster.nodes:
        node.wait_ready()
    cluster.wait_in_sync("t")
    produce(cluster)


def test_a_node_that_joined_later_moves(make_cluster):
    cluster = make_cluster(count=1, settings={"default.replication.factor": 1, "min.insync.replicas": 1})
    for _ in range(2):
        cluster.add_node()
    cluster.create("t")
    third = cluster.node(3)
    third.kill()
    move(third)
    third.launch().wait_ready()
    cluster.wait_in_sync("t")
    # Now the first, which the others were told of when they joined.
    first = cluster.node(1)
    first.kill()
    move(first)
    first.launch().wait_ready()
    cluster.wait_in_sync("t")
    produce(cluster)
