"""Who belongs to a cluster: growth, leaving, emptied disks, strangers, and what Kafka's tools say of it."""

import json
import re
import shutil
import signal
import subprocess
import time

import pytest
from cluster import PARTITIONS, Load, Node, free_ports, voters
from conftest import BINARY, clean_environment
from test_java_tools import LIB, TOOLS, run


def test_nodes_that_do_not_belong_are_refused(make_cluster):
    cluster = make_cluster()
    cluster.create("t", 1)
    third = cluster.node(3)

    # Another folder under an id that is in use, on another port.
    kafka_port, cluster_port = free_ports(2)
    peers = cluster.peers.replace(str(third.cluster_port), str(cluster_port))
    double = Node(3, cluster.dir / "double", kafka_port, cluster_port, peers, third.settings, 1)
    cluster.nodes.append(double)
    double.launch()
    cluster.wait("it is told so", lambda: "node.id 3 is in use" in double.log_text())
    double.kill()

    third.kill()
    cluster.wait("the others go on", lambda: 3 not in cluster.partitions("t")[0].isrs)

    # A certificate of somebody else's.
    other = cluster.dir / "ca"
    subprocess.run([BINARY, "cluster", "init-ca", "--dir", other], check=True, capture_output=True)
    subprocess.run([BINARY, "cluster", "issue", "--dir", other, "--node-id", "3"], check=True, capture_output=True)
    files = {"ca": "ca.pem", "cert": "node-3.pem", "key": "node-3.key"}
    third.launch(*[a for name, file in files.items() for a in ("--set", f"cluster.tls.{name}={other / file}")])
    cluster.wait("it reaches nobody", lambda: "invalid peer certificate" in third.log_text())
    third.kill()

    # Nothing of that changed anything, and the real one is welcome.
    third.launch().wait_ready()
    cluster.wait_in_sync("t")


def test_a_node_grows_to_three_and_the_first_leaves_under_load(make_cluster):
    cluster = make_cluster(count=1, settings={"default.replication.factor": 1, "min.insync.replicas": 1})
    cluster.create("t", replicas=1)
    load = Load(cluster, "t")
    for _ in range(3):
        cluster.add_node()
    # Kafka's own tool: three replicas each on the new nodes, not faster than 20 MB/s.
    wanted = [
        {"topic": "t", "partition": p, "replicas": [2 + p % 3, 2 + (p + 1) % 3, 2 + (p + 2) % 3]} for p in range(PARTITIONS)
    ]
    plan = cluster.dir / "plan.json"
    plan.write_text(json.dumps({"version": 1, "partitions": wanted}))
    tool = [TOOLS + "reassign.ReassignPartitionsCommand", "--bootstrap-server", cluster.bootstrap]
    tool += ["--reassignment-json-file", str(plan)]
    assert "Successfully started" in run(*tool, "--execute", "--throttle", "20000000")
    moved = lambda p: sorted(p.replicas) == [2, 3, 4] and len(p.isrs) == 3
    cluster.wait("all are moved", lambda: all(moved(p) for p in cluster.partitions("t").values()))
    verified = run(*tool, "--verify")
    assert verified.count("is completed") == PARTITIONS and "Clearing" in verified, verified

    # The first node led everything, the quorum and the group's offsets.
    out = cluster.command("drain", 1)
    assert "holds nothing any more" in out, out
    assert "listens" in next(line for line in cluster.command("status").splitlines() if line.split()[:1] == ["1"])
    first = cluster.node(1)
    first.signal(signal.SIGTERM)
    assert first.process.wait(30) == 0, first.log_text()
    assert "is forgotten" in cluster.command("remove-node", 1)
    # With the folder from before it is told so, and nothing else happens.
    first.launch()
    cluster.wait("it is told", lambda: "it was removed" in first.log_text())
    first.kill()
    load.cluster.nodes = cluster.nodes[1:]
    assert load.finish() > 1_000
    shown = cluster.command("status")
    assert "50 with" not in shown and re.search(r" 0 without a leader", shown), shown


def test_emptied_disks_come_back_as_new_members_and_old_copies_are_refused(make_cluster):
    cluster = make_cluster()
    cluster.create("t")
    load = Load(cluster, "t")
    old = cluster.dir / "old"
    for node in cluster.nodes:
        time.sleep(0.7)
        node.kill()
        if node.number == 1:
            shutil.copytree(node.folder, old)
        shutil.rmtree(node.folder)
        node.launch().wait_ready()
        cluster.wait_in_sync("t")
        # It votes again once it has caught up.
        cluster.wait(
            "all vote",
            lambda: sum(len(v) for role, v in voters(cluster).items() if role != "Observer") == 3,
        )
    assert load.finish() > 1_000

    # The folder from before: it has forgotten nothing that it should not, but what it voted since it has.
    first = cluster.node(1)
    first.kill()
    shutil.move(first.folder, cluster.dir / "new")
    shutil.copytree(old, first.folder)
    first.launch()
    refused = "has joined the cluster with another data folder since"
    cluster.wait("it is refused", lambda: refused in first.log_text() and refused in cluster.node(2).log_text())
    first.kill()

    # An old copy of the right folder.
    shutil.rmtree(first.folder)
    shutil.copytree(cluster.dir / "new", first.folder)
    first.launch().wait_ready()
    cluster.wait_in_sync("t")
    first.kill()
    shutil.rmtree(first.folder)
    shutil.move(cluster.dir / "new", first.folder)
    # It would be the same start again as far as its number goes.
    before = len(first.log_text())
    first.launch()
    cluster.wait("it is refused", lambda: "is an old copy" in first.log_text()[before:])
    assert first.process.wait(20) == 1
    shutil.rmtree(first.folder)
    first.launch().wait_ready()
    cluster.wait_in_sync("t")
    load.check()


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--peers", "1@127.0.0.1:1"], "--cluster-listen"),
        (["--peers", "7@127.0.0.1:1", "--cluster-listen", "127.0.0.1:1"], "not among them"),
        (["--peers", "nonsense", "--cluster-listen", "127.0.0.1:1"], "ID@HOST:PORT"),
        (["--peers", "0@10.1.2.3:1", "--cluster-listen", "127.0.0.1:1"], "init-ca"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_what_to_do(tmp_path, arguments, told):
    done = subprocess.run(
        [BINARY, "serve", "--data-dir", tmp_path / "data", "--kafka-listen", "127.0.0.1:0", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env=clean_environment(),
    )
    assert done.returncode == 1 and told in done.stderr, done.stderr


@pytest.mark.skipif(not LIB, reason="Kafka's tools are not installed")
def test_kafkas_tools_describe_the_quorum_and_elect_leaders(make_cluster):
    cluster = make_cluster()
    cluster.create("t", 3)
    server = ["--bootstrap-server", cluster.bootstrap]
    status = run(TOOLS + "MetadataQuorumCommand", *server, "describe", "--status")
    assert re.search(r"LeaderId:\s+[123]\b", status), status
    assert all(f'"id": {n}' in status for n in (1, 2, 3)), status

    first = cluster.node(1)
    first.signal(signal.SIGTERM)
    assert first.process.wait(30) == 0
    cluster.wait("others lead", lambda: all(p.leader != 1 for p in cluster.partitions("t").values()))
    first.launch().wait_ready()
    cluster.wait_in_sync("t")
    assert all(p.leader != 1 for p in cluster.partitions("t").values()), "nobody asked it to lead again"
    elect = ["--election-type", "preferred", "--all-topic-partitions"]
    said = run(TOOLS + "LeaderElectionCommand", *server, *elect)
    assert "Successfully completed leader election (PREFERRED)" in said, said
    cluster.wait(
        "preferred leaders lead", lambda: all(p.leader == p.replicas[0] for p in cluster.partitions("t").values())
    )
    unclean = ["--election-type", "unclean", "--topic", "t", "--partition", "0"]
    said = run(TOOLS + "LeaderElectionCommand", *server, *unclean, check=False)
    assert "Valid replica already elected" in said, said

    # The only replica loses its disk: nobody leads and hides that, until somebody says so.
    cluster.create("lone", 1, replicas=1)
    only = cluster.node(cluster.partitions("lone")[0].leader)
    only.kill()
    shutil.rmtree(only.folder)
    only.launch().wait_ready()
    cluster.wait_in_sync("t")
    assert cluster.partitions("lone")[0].leader == -1
    unclean[unclean.index("t")] = "lone"
    run(TOOLS + "LeaderElectionCommand", *server, *unclean)
    cluster.wait("it leads", lambda: cluster.partitions("lone")[0].leader == only.number)
