"""Nodes on this machine, load on them, and a checker of what clients saw."""

import collections
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from conftest import BINARY, clean_environment
from test_java_tools import TOOLS, run

PARTITIONS = 6
# What a consumer is told whose position is said to be no record's: its log was truncated, or does not reach that far.
RESETS = (KafkaError._LOG_TRUNCATION, KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE)
KEYS = 24
PORTS_OF_NODE = 4


def free_ports(count):
    """Ports that nobody uses now, and neither those behind them, which a node's further shards take. They are outside the range from
    which connections get theirs: nodes are started again on them."""
    ports = []
    while len(ports) < count:
        port = random.randrange(20_000, 30_000, PORTS_OF_NODE)
        if port not in ports and all(map(is_free, range(port, port + PORTS_OF_NODE))):
            ports.append(port)
    return ports


def is_free(port):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        try:
            tcp.bind(("127.0.0.1", port))
            udp.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Node:
    def __init__(self, number, folder, kafka_port, cluster_port, peers, settings, cores):
        self.cores = cores
        self.number, self.folder, self.port, self.cluster_port = number, folder, kafka_port, cluster_port
        self.peers, self.settings = peers, settings
        self.process = None
        self.environment = {}
        self.binary = BINARY
        self.log = open(folder.with_suffix(".log"), "a+")

    def launch(self, *extra):
        command = [str(self.binary), "serve", "--data-dir", str(self.folder), "--node-id", str(self.number)]
        command += ["--kafka-listen", f"127.0.0.1:{self.port}", "--cores", str(self.cores), "--memory", "256MiB"]
        command += ["--cluster-listen", f"127.0.0.1:{self.cluster_port}", "--peers", self.peers]
        for name, value in self.settings.items():
            command += ["--set", f"{name}={value}"]
        self.process = subprocess.Popen(
            command + list(extra),
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**clean_environment(), **self.environment},
            restore_signals=False,
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
        live = ",".join(f"127.0.0.1:{n.port}" for n in self.nodes if n.process.poll() is None)
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
        return ",".join(f"127.0.0.1:{n.port}" for n in self.nodes)

    def node(self, number):
        return self.nodes[number - 1]

    def admin(self):
        # It keeps its brokers: librdkafka loses a request that it has sent to a broker that it gives up for the bootstrap addresses.
        conf = {"topic.metadata.refresh.interval.ms": 500, "metadata.recovery.strategy": "none"}
        return AdminClient({"bootstrap.servers": self.bootstrap, **conf})

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


class Load:
    """Idempotent producers, each with keys of its own and a sequence of numbers for each key, and a reader beside them."""

    def __init__(self, cluster, topic, producers=2, pause=0.002, digits=0):
        self.cluster, self.topic, self.pause, self.digits = cluster, topic, pause, digits
        self.acked, self.unplaced, self.seen, self.errors = {}, [], {}, []
        self.stop_event = threading.Event()
        self.longest_gap, self.last_ack = 0.0, time.monotonic()
        share = KEYS // producers
        self.threads = [
            threading.Thread(target=self.produce, args=(range(n * share, (n + 1) * share),), daemon=True) for n in range(producers)
        ]
        self.threads.append(threading.Thread(target=self.read, daemon=True))
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
                producer.produce(self.topic, str(number).zfill(self.digits).encode(), str(key).encode(), on_delivery=done)
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
                "auto.offset.reset": "error",
                "reconnect.backoff.max.ms": 200,
                # So that it soon hears of a new leader epoch, and asks where its own ended (KIP-320).
                "topic.metadata.refresh.interval.ms": 1_000,
            }
        )
        consumer.assign([TopicPartition(self.topic, p, 0) for p in range(PARTITIONS)])
        positions = collections.Counter()
        while not self.stop_event.is_set():
            for message in consumer.consume(500, 0.1):
                partition = message.partition()
                if not message.error():
                    self.note(message)
                    if message.offset() != positions[partition]:
                        self.errors.append(f"partition {partition}: {message.offset()} was read after {positions[partition] - 1}")
                    positions[partition] = message.offset() + 1
                elif message.error().code() in RESETS:
                    self.errors.append(f"partition {partition} at {positions[partition]}: {message.error()}")
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
        places = collections.defaultdict(list)
        for place, value in final.items():
            places[value].append(place)
        twice = {v: [(p, "acknowledged" if p in self.acked else "not") for p in at] for v, at in places.items() if len(at) > 1}
        assert not twice, f"{len(twice)} there twice: {twice}\n{self.cluster.logs()}"
        last = {}
        for place in sorted(final):
            key, number = final[place]
            assert last.get(key, -1) < int(number), f"key {key} is out of order at {place}"
            last[key] = int(number)
        return len(self.acked)


def told_by_each(cluster, topic):
    """What each node that runs says of a topic."""
    asked = [["kcat", "-b", address, "-L", "-t", topic] for address in cluster.bootstrap.split(",")]
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


def voters(cluster):
    """Voters and observers of the metadata quorum, as Kafka's own tool shows them."""
    shown = run(TOOLS + "MetadataQuorumCommand", "--bootstrap-server", cluster.bootstrap, "describe", "--replication")
    roles = [line.split() for line in shown.splitlines()[1:] if line.strip()]
    return {role: sorted(int(r[0]) for r in roles if role in r) for role in ("Leader", "Follower", "Observer")}
