"""Three nodes on this machine: faults under load, and a checker of what clients saw."""

import collections
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time

import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic
from conftest import BINARY, ROOT, clean_environment
from test_java_tools import LIB, TOOLS, run

PARTITIONS = 6
KEYS = 24


def free_ports(count):
    """Ports that nobody uses now, outside the range from which connections get theirs: nodes are started again on them."""
    ports = []
    while len(ports) < count:
        port = random.randrange(20_000, 30_000)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            try:
                tcp.bind(("127.0.0.1", port))
                udp.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports


class Node:
    def __init__(self, number, folder, kafka_port, cluster_port, peers, settings, cores):
        self.cores = cores
        self.number, self.folder, self.kafka_port, self.cluster_port = number, folder, kafka_port, cluster_port
        self.peers, self.settings = peers, settings
        self.process = None
        self.environment = {}
        self.binary = BINARY
        self.log = open(folder.with_suffix(".log"), "a+")

    def launch(self, *extra):
        command = [str(self.binary), "serve", "--data-dir", str(self.folder), "--node-id", str(self.number)]
        command += ["--kafka-listen", f"127.0.0.1:{self.kafka_port}", "--cores", str(self.cores), "--memory", "256MiB"]
        command += ["--cluster-listen", f"127.0.0.1:{self.cluster_port}", "--peers", self.peers]
        for name, value in self.settings.items():
            command += ["--set", f"{name}={value}"]
        self.process = subprocess.Popen(
            command + list(extra),
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**clean_environment(), **self.environment},
        )
        return self

    def wait_ready(self):
        line = self.process.stdout.readline()
        assert "ready" in line, self.log_text()
        return self

    def kill(self):
        self.process.kill()
        self.process.wait(30)

    def signal(self, number):
        self.process.send_signal(number)

    def log_text(self):
        return pathlib.Path(self.log.name).read_text()


class Cluster:
    def __init__(self, count=3, settings=None, cores=1, racks=False, start=True):
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="millrace-cluster-"))
        ports = free_ports(2 * count)
        kafka, cluster = ports[:count], ports[count:]
        self.peers = ",".join(f"{n + 1}@127.0.0.1:{port}" for n, port in enumerate(cluster))
        settings = {"default.replication.factor": 3, "min.insync.replicas": 2, **(settings or {})}
        settings.setdefault("group.initial.rebalance.delay.ms", 0)
        self.nodes = [
            Node(n + 1, self.dir / str(n + 1), kafka[n], cluster[n], self.peers, settings, cores) for n in range(count)
        ]
        if racks:
            for node in self.nodes:
                node.settings = {**settings, "broker.rack": f"rack-{node.number}"}
        if start:
            self.start_all()

    def add_node(self):
        """Starts a node that joins, and makes it a voter."""
        kafka_port, cluster_port = free_ports(2)
        number = len(self.nodes) + 1
        peers = f"{self.peers},{number}@127.0.0.1:{cluster_port}"
        first = self.nodes[0]
        node = Node(number, self.dir / str(number), kafka_port, cluster_port, peers, first.settings, first.cores)
        self.nodes.append(node)
        node.launch().wait_ready()
        self.command("add-node", number)
        return node

    def command(self, *arguments):
        """Runs `millrace cluster …`."""
        live = ",".join(f"127.0.0.1:{n.kafka_port}" for n in self.nodes if n.process.poll() is None)
        done = subprocess.run(
            [BINARY, "cluster", *map(str, arguments), "--bootstrap", live], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr + self.logs()
        return done.stdout

    def start_all(self):
        for node in self.nodes:
            node.launch()
        for node in self.nodes:
            node.wait_ready()

    @property
    def bootstrap(self):
        return ",".join(f"127.0.0.1:{n.kafka_port}" for n in self.nodes)

    def node(self, number):
        return self.nodes[number - 1]

    def admin(self):
        return AdminClient({"bootstrap.servers": self.bootstrap, "topic.metadata.refresh.interval.ms": 500})

    def create(self, topic, partitions=PARTITIONS, replicas=3, **config):
        admin = self.admin()
        admin.create_topics([NewTopic(topic, partitions, replicas, config=config)])[topic].result(20)

    def partitions(self, topic):
        return self.admin().list_topics(topic, timeout=20).topics[topic].partitions

    def wait(self, what, holds, timeout=20):
        until = time.monotonic() + timeout
        while not holds():
            assert time.monotonic() < until, f"{what}: not within {timeout} s\n" + self.logs()
            time.sleep(0.05)

    def wait_in_sync(self, topic, count=3):
        self.wait("all in sync", lambda: all(len(p.isrs) == count for p in self.partitions(topic).values()))

    def logs(self):
        return "\n".join(f"== node {n.number}\n" + n.log_text()[-3000:] for n in self.nodes)

    def cleanup(self):
        for node in self.nodes:
            if node.process and node.process.poll() is None:
                node.signal(signal.SIGCONT)
                node.kill()
        texts = [n.log_text() for n in self.nodes]
        shutil.rmtree(self.dir, ignore_errors=True)
        assert not any("panicked" in t for t in texts), "\n".join(texts)


@pytest.fixture
def make_cluster():
    made = []

    def make(**kwargs):
        made.append(Cluster(**kwargs))
        return made[-1]

    yield make
    for cluster in made:
        cluster.cleanup()


class Load:
    """Idempotent producers, each with keys of its own and a sequence of numbers for each key, and a reader beside them."""

    def __init__(self, cluster, topic, producers=2, pause=0.002):
        self.cluster, self.topic, self.pause = cluster, topic, pause
        self.acked, self.unplaced, self.seen, self.errors = {}, [], {}, []
        self.stop_event = threading.Event()
        self.longest_gap, self.last_ack = 0.0, time.monotonic()
        share = KEYS // producers
        self.threads = [
            threading.Thread(target=self.produce, args=(range(n * share, (n + 1) * share),)) for n in range(producers)
        ]
        self.threads.append(threading.Thread(target=self.read))
        for thread in self.threads:
            thread.start()

    def produce(self, keys):
        producer = Producer(
            {
                "bootstrap.servers": self.cluster.bootstrap,
                "enable.idempotence": True,
                "linger.ms": 0,
                "message.timeout.ms": 60_000,
                "topic.metadata.refresh.interval.ms": 1_000,
                "retry.backoff.ms": 20,
                "reconnect.backoff.ms": 20,
                "reconnect.backoff.max.ms": 200,
            }
        )

        def done(error, message):
            if error:
                self.errors.append(str(error))
                return
            now = time.monotonic()
            self.longest_gap = max(self.longest_gap, now - self.last_ack)
            self.last_ack = now
            value = (message.key(), message.value())
            if message.offset() is None:
                # librdkafka knows that a batch it sends again was taken the first time, and not where: it must be there.
                self.unplaced.append((message.partition(), *value))
                return
            place = (message.partition(), message.offset())
            if self.acked.setdefault(place, value) != value:
                self.errors.append(f"{place} was acknowledged as {self.acked[place]} and as {value}")

        number = 0
        while not self.stop_event.is_set():
            for key in keys:
                producer.produce(self.topic, str(number).encode(), str(key).encode(), on_delivery=done)
            number += 1
            producer.poll(self.pause)
        if producer.flush(60):
            self.errors.append("records were neither acknowledged nor refused")

    def read(self):
        consumer = Consumer(
            {
                "bootstrap.servers": self.cluster.bootstrap,
                "group.id": "reader-" + self.topic,
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "reconnect.backoff.max.ms": 200,
            }
        )
        consumer.assign([TopicPartition(self.topic, p, 0) for p in range(PARTITIONS)])
        while not self.stop_event.is_set():
            for message in consumer.consume(500, 0.1):
                if not message.error():
                    self.note(message)
        consumer.close()

    def note(self, message):
        place, value = (message.partition(), message.offset()), (message.key(), message.value())
        if self.seen.setdefault(place, value) != value:
            self.errors.append(f"{place} was read as {self.seen[place]} and as {value}")

    def finish(self):
        self.stop_event.set()
        for thread in self.threads:
            thread.join(90)
        return self.check()

    def check(self):
        """Reads everything back: nothing acknowledged is missing, nothing is there twice, each key's numbers rise."""
        final = read_all(self.cluster, self.topic)
        assert not self.errors, self.errors[:5]
        missing = {p: v for p, v in self.acked.items() if final.get(p) != v}
        assert not missing, f"{len(missing)} of {len(self.acked)} acknowledged are not there: {list(missing.items())[:5]}"
        there = {(partition, *value) for (partition, _), value in final.items()}
        assert there.issuperset(self.unplaced), [v for v in self.unplaced if v not in there][:5]
        changed = {p: v for p, v in self.seen.items() if final.get(p) != v}
        assert not changed, f"read once and not any more: {list(changed.items())[:5]}"
        twice = [v for v, n in collections.Counter(final.values()).items() if n > 1]
        assert not twice, f"there twice: {twice[:5]}"
        last = {}
        for place in sorted(final):
            key, number = final[place]
            assert last.get(key, -1) < int(number), f"key {key} is out of order at {place}"
            last[key] = int(number)
        return len(self.acked)


def told_by_each(cluster, topic):
    """What each node that runs says of a topic."""
    ports = [n.kafka_port for n in cluster.nodes if n.process.poll() is None]
    asked = [["kcat", "-b", f"127.0.0.1:{port}", "-L", "-t", topic] for port in ports]
    return "\n".join(subprocess.run(a, capture_output=True, text=True, timeout=20).stdout for a in asked)


def read_all(cluster, topic):
    consumer = Consumer(
        {
            "bootstrap.servers": cluster.bootstrap,
            "group.id": "all",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
        }
    )
    partitions = range(PARTITIONS)

    def end(partition):
        until = time.monotonic() + 10
        while True:
            try:
                return consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=30)[1]
            except KafkaException as error:
                # Whoever answered knows that the leader has died, and not yet who follows it.
                assert time.monotonic() < until, f"{error}\n" + told_by_each(cluster, topic) + cluster.logs()
                time.sleep(0.1)

    ends = {p: end(p) for p in partitions}
    consumer.assign([TopicPartition(topic, p, 0) for p in partitions])
    found, until = {}, time.monotonic() + 60
    while any((p, end - 1) not in found for p, end in ends.items() if end) and time.monotonic() < until:
        for message in consumer.consume(1000, 0.5):
            if not message.error():
                found[(message.partition(), message.offset())] = (message.key(), message.value())
    consumer.close()
    for p, end in ends.items():
        assert {o for q, o in found if q == p} == set(range(end)), f"partition {p} has holes below {end}"
    return found


def test_three_nodes_started_at_once_form_a_cluster(make_cluster):
    cluster = make_cluster()
    cluster.create("t")
    described = []
    for node in cluster.nodes:
        admin = AdminClient({"bootstrap.servers": f"127.0.0.1:{node.kafka_port}"})
        found = admin.list_topics("t", timeout=10)
        described.append((found.cluster_id, sorted(found.brokers), len(found.topics["t"].partitions)))
    assert described == [described[0]] * 3
    assert described[0][1:] == ([1, 2, 3], PARTITIONS)
    leaders = collections.Counter(p.leader for p in cluster.partitions("t").values())
    assert sorted(leaders) == [1, 2, 3], "leaders are spread"


def test_a_topic_is_there_on_every_node_as_soon_as_its_creation_is_answered(make_cluster):
    cluster = make_cluster()
    connections = [socket.create_connection(("127.0.0.1", n.kafka_port)) for n in cluster.nodes]

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
        assert created.endswith(text(name) + b"\0\0\0\0"), created
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


def test_a_follower_catches_up_no_faster_than_it_may_while_others_are_served(make_cluster):
    cluster = make_cluster()
    cluster.create("bulk", 1)
    cluster.create("t")
    producer = Producer({"bootstrap.servers": cluster.bootstrap, "linger.ms": 20, "batch.size": 200_000})
    payload = os.urandom(10_000)
    for _ in range(1_600):
        producer.produce("bulk", payload)
        producer.poll(0)
    assert producer.flush(60) == 0
    partition = cluster.partitions("bulk")[0]
    lagging = cluster.node(next(n for n in partition.replicas if n != partition.leader))
    admin = cluster.admin()
    for node in cluster.nodes:
        rate = ConfigEntry("leader.replication.throttled.rate", "4000000", incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource("BROKER", str(node.number), incremental_configs=[rate])
        admin.incremental_alter_configs([resource])[resource].result(10)
    lagging.kill()
    shutil.rmtree(lagging.folder)
    begun = time.monotonic()
    lagging.launch().wait_ready()
    load = Load(cluster, "t")
    cluster.wait_in_sync("bulk")
    took = time.monotonic() - begun
    # 16 MB at 4 MB/s, less what goes at once; a debug build takes well under a second without a bound.
    assert took > 3, f"{took:.1f} s"
    assert load.finish() > 500
    assert load.longest_gap < 2, f"no acknowledgement for {load.longest_gap:.1f} s"


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


def test_replicas_that_are_enough_alone_take_over_and_the_last_one_standing_too(make_cluster):
    """KIP-966: of three replicas two go, one after the other; then the last one goes, and the second is back first."""
    cluster = make_cluster(count=5, settings={"offsets.topic.replication.factor": 5})
    cluster.create("t", 1)
    replicas = cluster.partitions("t")[0].replicas
    producer = Producer({"bootstrap.servers": cluster.bootstrap, "acks": "all", "enable.idempotence": True, "linger.ms": 0})
    acked = []

    def produce(count):
        for i in range(count):
            number = len(acked)
            producer.produce("t", str(number).encode(), on_delivery=lambda e, m: e or acked.append(m.value()))
            producer.flush(10)

    produce(100)
    third, second = (cluster.node(n) for n in replicas[:0:-1])
    third.kill()
    cluster.wait("it is out", lambda: len(cluster.partitions("t")[0].isrs) == 2)
    produce(100)
    second.kill()
    cluster.wait("it is out", lambda: len(cluster.partitions("t")[0].isrs) == 1)
    # What the leader takes alone is not acknowledged, and nobody reads it.
    admin = cluster.admin()
    alone = Producer({"bootstrap.servers": cluster.bootstrap, "acks": 1, "linger.ms": 0})
    alone.produce("t", b"alone")
    assert alone.flush(10) == 0

    def last():
        reader = Consumer({"bootstrap.servers": cluster.bootstrap, "group.id": "r"})
        try:
            return reader.get_watermark_offsets(TopicPartition("t", 0), timeout=10)[1]
        finally:
            reader.close()

    assert last() == 200
    cluster.node(replicas[0]).kill()
    # The third lacks some of it and must not lead; the second has all.
    third.launch().wait_ready()
    time.sleep(1)
    assert admin.list_topics("t", timeout=10).topics["t"].partitions[0].leader == -1
    second.launch().wait_ready()
    cluster.wait("it leads", lambda: cluster.partitions("t")[0].leader == replicas[1])
    cluster.wait("the third follows", lambda: len(cluster.partitions("t")[0].isrs) == 2)
    produce(100)
    assert len(acked) == 300
    assert last() == 300


def voters(cluster):
    """Voters and observers of the metadata quorum, as Kafka's own tool shows them."""
    shown = run(TOOLS + "MetadataQuorumCommand", "--bootstrap-server", cluster.bootstrap, "describe", "--replication")
    roles = [line.split() for line in shown.splitlines()[1:] if line.strip()]
    return {role: sorted(int(r[0]) for r in roles if role in r) for role in ("Leader", "Follower", "Observer")}


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


@pytest.mark.skipif(not LIB, reason="Kafka's tools are not installed")
def test_a_leader_whose_log_is_damaged_is_followed_by_another(make_cluster):
    cluster = make_cluster()
    cluster.create("t", 1)
    producer = Producer({"bootstrap.servers": cluster.bootstrap, "linger.ms": 0})
    for n in range(300):
        producer.produce("t", f"{n:06}".encode() * 20)
        producer.poll(0.001)
    assert producer.flush(20) == 0
    leader = cluster.node(cluster.partitions("t")[0].leader)
    leader.signal(signal.SIGTERM)
    assert leader.process.wait(30) == 0
    segments = [p for p in leader.folder.glob("logs/*/0/*.segment") if b"000200" in p.read_bytes()]
    assert len(segments) == 1
    content = bytearray(segments[0].read_bytes())
    content[content.index(b"000200")] ^= 1
    segments[0].write_bytes(content)
    leader.launch().wait_ready()
    cluster.wait_in_sync("t")
    preferred = ["--election-type", "preferred", "--all-topic-partitions"]
    run(TOOLS + "LeaderElectionCommand", "--bootstrap-server", cluster.bootstrap, *preferred)
    cluster.wait("it leads again", lambda: cluster.partitions("t")[0].leader == leader.number)

    consumer = Consumer(
        {"bootstrap.servers": cluster.bootstrap, "group.id": "g", "auto.offset.reset": "error", "retry.backoff.ms": 50}
    )
    consumer.assign([TopicPartition("t", 0, 0)])
    got, until = [], time.monotonic() + 30
    while len(got) < 300 and time.monotonic() < until:
        got += [m.value()[:6] for m in consumer.consume(100, 0.5) if not m.error()]
    consumer.close()
    assert got == [f"{n:06}".encode() for n in range(300)], leader.log_text()
    assert "stored records are damaged" in leader.log_text()
    assert cluster.partitions("t")[0].leader != leader.number

    # The damaged copy begins anew and is in sync again, and whole; after a kill, too.
    cluster.wait_in_sync("t")
    assert "a copy has failed and begins anew" in leader.log_text()
    for _ in range(2):
        leader.kill()
        leader.launch().wait_ready()
        cluster.wait_in_sync("t")
    assert len(read_segments(leader, "t")) == 300


def read_segments(node, topic):
    """The values in a node's own files, in order: of the stopped node, which is started again."""
    node.signal(signal.SIGTERM)
    assert node.process.wait(30) == 0
    saved = node.folder.with_suffix(".saved")
    done = subprocess.run(
        [BINARY, "export", "--data-dir", node.folder, "--to", saved, "--topic", topic], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    node.launch().wait_ready()
    content = b"".join(p.read_bytes() for p in sorted(saved.glob("**/*.log")))
    return sorted(set(re.findall(rb"(\d{6})\1{19}", content)))


def test_a_consumer_reads_from_the_replica_in_its_rack(make_cluster):
    cluster = make_cluster(
        settings={"replica.selector.class": "org.apache.kafka.common.replica.RackAwareReplicaSelector"}, racks=True
    )
    cluster.create("t", 1)
    producer = Producer({"bootstrap.servers": cluster.bootstrap})
    for n in range(500):
        producer.produce("t", str(n).encode())
    assert producer.flush(20) == 0
    leader = cluster.partitions("t")[0].leader
    near = leader % 3 + 1
    fetches = {}

    def count(text):
        for broker in json.loads(text)["brokers"].values():
            fetches[broker["nodeid"]] = broker["req"].get("Fetch", 0)

    consumer = Consumer(
        {
            "bootstrap.servers": cluster.bootstrap,
            "group.id": "g",
            "client.rack": f"rack-{near}",
            "auto.offset.reset": "earliest",
            "statistics.interval.ms": 200,
            "stats_cb": count,
        }
    )
    consumer.assign([TopicPartition("t", 0, 0)])
    got, until = [], time.monotonic() + 20

    def read(want):
        while len(got) < want and time.monotonic() < until:
            got.extend(int(m.value()) for m in consumer.consume(100, 0.2) if not m.error())

    read(500)
    for n in range(500, 520):
        producer.produce("t", str(n).encode())
        producer.flush(5)
    read(520)
    assert got == list(range(520))
    consumer.consume(1, 1)
    assert fetches[near] > fetches[leader], fetches

    # Without its replica it goes back to the leader.
    cluster.node(near).kill()
    for n in range(520, 540):
        producer.produce("t", str(n).encode())
    assert producer.flush(20) == 0
    read(540)
    consumer.close()
    assert got == list(range(540))


class CutCluster(Cluster):
    """Nodes in network namespaces of their own, so that links between them can be cut."""

    SCRIPT = ROOT / "scripts" / "cluster-local.sh"

    def __init__(self, *options):
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="millrace-cut-"))
        self.addresses = self.script("up", "3", "--netns", "--cores", "1", "--memory", "256MiB", *options).split()[-1]
        self.nodes = []

    @property
    def bootstrap(self):
        return self.addresses

    def script(self, *arguments):
        environment = {**clean_environment(), "CLUSTER_DIR": str(self.dir / "nodes"), "CLUSTER_BIN": str(BINARY)}
        done = subprocess.run([self.SCRIPT, *arguments], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def logs(self):
        return "\n".join(p.read_text()[-3000:] for p in sorted(self.dir.glob("nodes/*/log")))

    def cleanup(self):
        text = self.logs()
        self.script("down")
        shutil.rmtree(self.dir, ignore_errors=True)
        assert "panicked" not in text, text


def namespaces_can_be_made():
    tools = shutil.which("ip") and shutil.which("nft")
    if not tools or os.geteuid() != 0:
        return False
    made = subprocess.run(["ip", "netns", "add", "millrace-probe"], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", "millrace-probe"], capture_output=True)
    return made


@pytest.mark.skipif(not namespaces_can_be_made(), reason="needs root, iproute2 and nftables")
def test_links_that_are_cut_lose_nothing():
    cluster = CutCluster()
    try:
        cluster.create("t")
        load = Load(cluster, "t")
        for victim, others in ((1, (2, 3)), (2, (1, 3))):
            # Nobody hears it, and it hears nobody.
            for other in others:
                cluster.script("cut", str(victim), str(other))
            cluster.wait(
                "others lead",
                lambda: all(p.leader not in (-1, victim) for p in cluster.partitions("t").values()),
            )
            time.sleep(1.5)
            cluster.script("heal")
            cluster.wait_in_sync("t")
            time.sleep(0.5)
        # It hears the others, and they do not hear it; then the other way round.
        for pairs in (("3", "1"), ("3", "2")), (("1", "3"), ("2", "3")):
            for pair in pairs:
                cluster.script("oneway", *pair)
            time.sleep(3)
            cluster.script("heal")
            cluster.wait_in_sync("t")
        assert load.finish() > 1_000
    finally:
        cluster.cleanup()


@pytest.mark.skipif(not namespaces_can_be_made(), reason="needs root, iproute2 and nftables")
def test_a_node_behind_a_slow_link_holds_up_nobody_for_long():
    cluster = CutCluster("--set", "replica.lag.time.max.ms=1500")
    try:
        cluster.create("t")
        load = Load(cluster, "t")
        time.sleep(1)
        # Its heartbeats still come, and what it is to be sent does not: it leaves the ISRs.
        cluster.script("slow", "3", "100")
        led = lambda: [p for p in cluster.partitions("t").values() if p.leader != 3]
        cluster.wait("it is out of sync", lambda: led() and all(3 not in p.isrs for p in led()), 40)
        acked = len(load.acked)
        time.sleep(2)
        assert len(load.acked) > acked, "the others go on"
        cluster.script("heal")
        cluster.wait_in_sync("t")
        assert load.finish() > 500
    finally:
        cluster.cleanup()


def loop_mounts_can_be_made():
    if os.geteuid() != 0 or not shutil.which("mkfs.ext4"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        image, mount = os.path.join(folder, "image"), os.path.join(folder, "mount")
        os.mkdir(mount)
        made = subprocess.run(f"truncate -s 16M {image} && mkfs.ext4 -q {image} && mount -o loop {image} {mount}", shell=True)
        if made.returncode == 0:
            subprocess.run(["umount", mount], check=True)
        return made.returncode == 0


@pytest.mark.skipif(not loop_mounts_can_be_made(), reason="needs root and loop devices")
def test_a_node_whose_disk_is_full_leaves_and_comes_back_when_there_is_room(make_cluster):
    cluster = make_cluster(settings={"journal.bytes": 33_554_432, "disk.free.bytes.min": 20_000_000})
    cluster.create("t")
    third = cluster.node(3)
    third.signal(signal.SIGTERM)
    assert third.process.wait(30) == 0
    image = cluster.dir / "disk"
    subprocess.run(["truncate", "-s", "300M", image], check=True)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    shutil.move(third.folder, cluster.dir / "before")
    third.folder.mkdir()
    subprocess.run(["mount", "-o", "loop", image, third.folder], check=True)
    try:
        (third.folder / "lost+found").rmdir()
        shutil.copytree(cluster.dir / "before", third.folder, dirs_exist_ok=True)
        third.launch().wait_ready()
        cluster.wait_in_sync("t")
        load = Load(cluster, "t")
        time.sleep(1)
        free = shutil.disk_usage(third.folder).free
        filler = third.folder / "filler"
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - 4_000_000)
        cluster.wait("others lead, without it", lambda: all(3 not in p.isrs for p in cluster.partitions("t").values()), 40)
        acked = len(load.acked)
        time.sleep(1.5)
        assert len(load.acked) > acked, "the others go on"
        filler.unlink()
        cluster.wait_in_sync("t")
        assert load.finish() > 500
    finally:
        third.kill()
        subprocess.run(["umount", third.folder], check=True)


FAKETIME = next(iter(pathlib.Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)


@pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime")
def test_clocks_that_jump_move_nothing(make_cluster):
    cluster = make_cluster(start=False)
    clocks = [cluster.dir / f"clock-{n.number}" for n in cluster.nodes]
    for node, clock in zip(cluster.nodes, clocks):
        clock.write_text("+0")
        node.environment = {
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }
    cluster.start_all()
    cluster.create("t")
    load = Load(cluster, "t")
    rebalances = []
    member = Consumer({"bootstrap.servers": cluster.bootstrap, "group.id": "g", "auto.offset.reset": "earliest"})
    member.subscribe(["t"], on_assign=lambda _, partitions: rebalances.append(len(partitions)))
    until = time.monotonic() + 20
    while not rebalances and time.monotonic() < until:
        member.consume(100, 0.2)
    leaders = {i: (p.leader, p.isrs) for i, p in cluster.partitions("t").items()}
    for offsets in (("+1500", "+0", "-1500"), ("-1500", "+1500", "+0"), ("+0", "-3000", "+3000")):
        for clock, offset in zip(clocks, offsets):
            clock.write_text(offset)
        until = time.monotonic() + 2
        while time.monotonic() < until:
            member.consume(100, 0.2)
    assert {i: (p.leader, p.isrs) for i, p in cluster.partitions("t").items()} == leaders
    member.consume(100, 1)
    member.close()
    assert rebalances == [PARTITIONS], "sessions do not end because a clock was set"
    assert load.finish() > 1_000
    assert not any("fenced" in n.log_text() for n in cluster.nodes)


def test_a_partition_moved_away_and_back_survives_a_kill(make_cluster):
    cluster = make_cluster(count=4)
    cluster.create("t")
    load = Load(cluster, "t")
    tool = [TOOLS + "reassign.ReassignPartitionsCommand", "--bootstrap-server", cluster.bootstrap, "--execute"]

    def move(nodes):
        plan = cluster.dir / "plan.json"
        wanted = [{"topic": "t", "partition": p, "replicas": nodes[p % 3 :] + nodes[: p % 3]} for p in range(PARTITIONS)]
        plan.write_text(json.dumps({"version": 1, "partitions": wanted}))
        run(*tool, "--reassignment-json-file", str(plan))
        there = lambda p: sorted(p.replicas) == sorted(nodes) and len(p.isrs) == 3
        cluster.wait("moved", lambda: all(there(p) for p in cluster.partitions("t").values()))

    move([1, 2, 3])
    move([2, 3, 4])
    move([1, 2, 3])
    for number in (1, 2):
        cluster.node(number).kill()
        time.sleep(0.3)
        cluster.node(number).launch().wait_ready()
        cluster.wait_in_sync("t")
    assert load.finish() > 1_000
    # The first leads all of it now and shows its own copy.
    for number in (2, 3):
        cluster.node(number).kill()
        cluster.wait("others lead", lambda: all(p.leader not in (-1, number) for p in cluster.partitions("t").values()))
        if number == 2:
            cluster.node(2).launch().wait_ready()
            cluster.wait_in_sync("t")
    load.check()


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
    found = committed.committed([TopicPartition("t", p) for p in range(PARTITIONS)], timeout=20)
    assert [tp.offset for tp in found] == list(range(PARTITIONS))
    # Now that every node knows it, the feature level may be raised; here it is the highest already.
    server = ["--bootstrap-server", cluster.bootstrap]
    shown = run(TOOLS + "FeatureCommand", *server, "describe")
    assert re.search(r"millrace.version.*FinalizedVersionLevel: 1", shown), shown
    admin_says = run(TOOLS + "FeatureCommand", *server, "upgrade", "--feature", "millrace.version=9", check=False)
    assert "upgrade it first" in admin_says, admin_says
