"""Files that were written for Kafka's brokers start this one: what means something here counts, the rest is named."""

import re
import subprocess

import pytest
from cluster import free_ports
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType
from conftest import BINARY, clean_environment

KRAFT = """
# As of Kafka 4, one node.
process.roles=broker,controller
node.id=7
controller.quorum.bootstrap.servers=localhost:19093
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:19093
inter.broker.listener.name=PLAINTEXT
advertised.listeners=PLAINTEXT://localhost:{port},CONTROLLER://localhost:19093
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SSL:SSL,SASL_PLAINTEXT:SASL_PLAINTEXT,SASL_SSL:SASL_SSL
num.network.threads=3
num.io.threads=8
socket.send.buffer.bytes=102400
socket.receive.buffer.bytes=102400
socket.request.max.bytes=104857600
log.dirs={folder}
num.partitions=2
num.recovery.threads.per.data.dir=2
offsets.topic.replication.factor=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
log.retention.hours=48
log.segment.bytes=1073741824
log.retention.check.interval.ms=300000
"""

ZOOKEEPER = """
broker.id=7
listeners=PLAINTEXT://127.0.0.1:{port}
advertised.listeners=PLAINTEXT://localhost:{port}
zookeeper.connect=localhost:2181
zookeeper.connection.timeout.ms=18000
security.inter.broker.protocol=PLAINTEXT
inter.broker.protocol.version=3.6
log.message.format.version=3.0
log.dirs={folder}
log.retention.hours = 1
log.retention.minutes : 2880
log.roll.hours=24
log.cleaner.enable=true
log.cleanup.policy=delete
log.flush.interval.messages=1
log.flush.interval.ms=1000
auto.create.topics.enable=TRUE
delete.topic.enable=true
unclean.leader.election.enable=false
default.replication.factor=1
num.partitions=2
num.replica.fetchers=4
replica.fetch.max.bytes=1048576
replica.lag.time.max.ms=30000
replica.socket.timeout.ms=30000
message.max.bytes=1048588
queued.max.requests=500
background.threads=10
controlled.shutdown.enable=true
group.initial.rebalance.delay.ms=0
group.max.session.timeout.ms=1800000
offsets.retention.minutes=10080
offsets.topic.num.partitions=50
max.connections.per.ip=2147483647
leader.imbalance.per.broker.percentage=10
compression.type=producer
ssl.keystore.password=secret-of-nobody
metric.reporters=
"""


@pytest.mark.parametrize("text", [KRAFT, ZOOKEEPER], ids=["kraft", "zookeeper"])
def test_a_file_of_kafka_starts_a_broker(tmp_path, text):
    [port] = free_ports(1)
    folder, file = tmp_path / "logs", tmp_path / "server.properties"
    file.write_text(text.format(port=port, folder=folder))
    command = [BINARY, "serve", "--config", file, "--cores", "1"]
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=clean_environment())
        try:
            line = process.stdout.readline()
            log.seek(0)
            said = log.read()
            assert f"ready, Kafka clients connect to localhost:{port}" in line, said
            admin = AdminClient({"bootstrap.servers": f"127.0.0.1:{port}"})
            listed = admin.list_topics("made-by-asking", timeout=10)
            [broker] = listed.brokers.values()
            assert (broker.id, broker.host, broker.port) == (7, "localhost", port)
            (entries,) = admin.describe_configs([ConfigResource(ResourceType.BROKER, "7")]).values()
            told = {name: entry.value for name, entry in entries.result(10).items()}
            assert told["log.retention.ms"] == str(48 * 3600 * 1000)
            assert told["num.partitions"] == "2"
            assert told["log.dirs"] == str(folder)
            assert (folder / "journal-0").exists() or list(folder.iterdir())
            [unused] = re.findall(r"passed over settings=\"(.*)\"", said)
            given = set(re.findall(r"^[a-z.]+", text.lower(), re.M))
            assert set(unused.split(", ")) <= given
            expected = {"num.io.threads", "process.roles"} if text is KRAFT else {"zookeeper.connect", "background.threads"}
            assert expected <= set(unused.split(", "))
            assert "log.retention.hours" not in unused and "secret-of-nobody" not in said
        finally:
            process.terminate()
            assert process.wait(30) == 0


@pytest.mark.parametrize("line, why", [
    ("listeners=PLAINTEXT://:9092", "advertised.listeners"),
    ("listeners=SSL://127.0.0.1:9093", "TLS and SASL for clients are not there yet"),
    ("listeners=PLAINTEXT://:9092,SASL_SSL://:9093", "one is supported"),
    ("security.inter.broker.protocol=SASL_SSL", "cluster.tls.ca"),
    ("log.dirs=/disk-1,/disk-2", "one folder holds all data"),
    ("authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer", "no ACLs yet"),
    ("unclean.leader.election.enable=true", "on the topics"),
    ("controller.quorum.voters=1@a:9093,2@b:9093,3@c:9093", "peers"),
    ("broker.id=1\nnode.id=2", "leave one of them"),
    ("log.cleanup.policy=compact", "compaction"),
    ("num.io.treads=8", "did you mean \"num.io.threads\""),
    ("retention.ms=1", "did you mean \"log.retention.ms\""),
])
def test_what_cannot_be_done_stops_the_start_with_a_reason(tmp_path, line, why):
    file, folder = tmp_path / "server.properties", tmp_path / "data"
    file.write_text(f"{line}\n")
    command = [BINARY, "serve", "--config", file, "--set", f"data.dir={folder}"]
    if "log.dirs" in line:
        command = command[:-2]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, env=clean_environment(), cwd=tmp_path)
    assert ended.returncode == 1 and why in ended.stderr, ended.stderr
    assert not folder.exists()
