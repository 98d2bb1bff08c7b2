"""A second machine with the id of a node of the cluster and an empty folder: it takes the node's place only if that is gone."""

import signal

import pytest
from cluster import Node, free_ports
from test_moved_nodes import produce


def second(cluster, number):
    """The same node on another machine: another folder and other ports."""
    first = cluster.node(number)
    kafka_port, cluster_port = free_ports(2)
    peers = first.peers.replace(f"{number}@127.0.0.1:{first.cluster_port}", f"{number}@127.0.0.1:{cluster_port}")
    double = Node(number, cluster.dir / f"second-{number}", kafka_port, cluster_port, peers, first.settings, 1)
    cluster.nodes.append(double)
    return double


@pytest.fixture
def paused(make_cluster):
    cluster = make_cluster()
    cluster.create("t")
    produce(cluster)
    third = cluster.node(3)
    third.signal(signal.SIGSTOP)
    cluster.wait("it is fenced", lambda: all(3 not in p.isrs for p in cluster.partitions("t").values()))
    double = second(cluster, 3)
    double.launch()
    cluster.wait("it is told", lambda: "may still run" in double.log_text() and "replace-node 3" in double.log_text())
    return cluster, third, double


def test_a_paused_node_keeps_its_place(paused):
    cluster, third, double = paused
    third.signal(signal.SIGCONT)
    cluster.wait_in_sync("t")
    cluster.wait("it is told so", lambda: "is in use by a broker with another data folder" in double.log_text(), timeout=30)
    double.kill()
    cluster.nodes.remove(double)
    produce(cluster)


def test_an_operator_gives_a_paused_nodes_place_away(paused):
    cluster, third, double = paused
    # The one that is paused is not asked.
    cluster.nodes.remove(third)
    assert "from another machine, once" in cluster.command("replace-node", 3)
    double.wait_ready()
    cluster.wait_in_sync("t")
    third.signal(signal.SIGCONT)
    cluster.wait("the old one is told", lambda: "with another data folder since" in third.log_text())
    cluster.wait_in_sync("t")
    produce(cluster)
    third.kill()


def test_a_process_that_is_gone_needs_no_word(make_cluster):
    cluster = make_cluster()
    cluster.create("t")
    produce(cluster)
    third = cluster.node(3)
    third.kill()
    cluster.wait("it is fenced", lambda: all(3 not in p.isrs for p in cluster.partitions("t").values()))
    double = second(cluster, 3)
    cluster.nodes.remove(third)
    double.launch().wait_ready()
    cluster.wait_in_sync("t")
    produce(cluster)
