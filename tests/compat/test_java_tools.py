"""Kafka's own Java clients and tools, unmodified, against a broker of this checkout."""

import json
import os
import pathlib
import subprocess
import uuid

import pytest

LIB = pathlib.Path(os.environ.get("MILLRACE_TEST_JAVA_LIB", ""))
pytestmark = pytest.mark.skipif(not LIB.is_dir(), reason="scripts/test.sh fetches the jars and names their folder")

TOOLS = "org.apache.kafka.tools."


def run(main, *args, stdin=None, check=True):
    done = subprocess.run(
        ["java", "-Xmx256m", "-XX:TieredStopAtLevel=1", "-cp", f"{LIB}/*", main, *args],
        input=stdin, capture_output=True, text=True, timeout=90,
    )
    assert not check or done.returncode == 0, f"{main} {args}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def server(broker):
    return ["--bootstrap-server", broker.bootstrap]


def name():
    return "java-" + uuid.uuid4().hex[:8]


def test_topics_are_created_described_altered_and_deleted(server):
    topic = name()
    run(TOOLS + "TopicCommand", *server, "--create", "--topic", topic, "--partitions", "4", "--config", "retention.ms=60000")
    described = run(TOOLS + "TopicCommand", *server, "--describe", "--topic", topic)
    assert "PartitionCount: 4" in described and "retention.ms=60000" in described, described
    run(TOOLS + "TopicCommand", *server, "--alter", "--topic", topic, "--partitions", "6")
    assert run(TOOLS + "TopicCommand", *server, "--describe", "--topic", topic).count("Leader: 0") == 6
    run("kafka.admin.ConfigCommand", *server, "--alter", "--topic", topic, "--add-config", "flush.messages=100")
    assert "flush.messages=100" in run("kafka.admin.ConfigCommand", *server, "--describe", "--topic", topic)
    run(TOOLS + "TopicCommand", *server, "--delete", "--topic", topic)
    assert topic not in run(TOOLS + "TopicCommand", *server, "--list")


def test_verifiable_producer_and_consumer(server, broker):
    topic, group = name(), name()
    run(TOOLS + "TopicCommand", *server, "--create", "--topic", topic, "--partitions", "3")
    out = run(TOOLS + "VerifiableProducer", *server, "--topic", topic, "--max-messages", "20000", "--acks", "-1")
    acked = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert sum(e["name"] == "producer_send_success" for e in acked) == 20000
    out = run(TOOLS + "VerifiableConsumer", *server, "--topic", topic, "--group-id", group, "--max-messages", "20000",
              "--reset-policy", "earliest")
    events = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert sum(e["count"] for e in events if e["name"] == "records_consumed") >= 20000
    described = run(TOOLS + "consumer.group.ConsumerGroupCommand", *server, "--describe", "--group", group)
    rows = [line.split() for line in described.splitlines() if topic in line]
    assert sum(int(row[3]) for row in rows) == 20000, described
    offsets = run(TOOLS + "GetOffsetShell", *server, "--topic", topic)
    assert sum(int(line.rsplit(":", 1)[1]) for line in offsets.splitlines() if line.startswith(topic)) == 20000
    reset = run(TOOLS + "consumer.group.ConsumerGroupCommand", *server, "--group", group, "--topic", topic,
                "--reset-offsets", "--to-earliest", "--execute")
    assert topic in reset, reset
    run(TOOLS + "consumer.group.ConsumerGroupCommand", *server, "--group", group, "--delete")


def test_console_tools(server):
    topic = name()
    lines = [f"k{n}:value {n}" for n in range(100)]
    run(TOOLS + "ConsoleProducer", *server, "--topic", topic, "--reader-property", "parse.key=true", "--reader-property",
        "key.separator=:", stdin="\n".join(lines) + "\n")
    out = run(TOOLS + "consumer.ConsoleConsumer", *server, "--topic", topic, "--from-beginning", "--max-messages", "100",
              "--formatter-property", "print.key=true", "--formatter-property", "key.separator=:")
    assert sorted(line for line in out.splitlines() if line.startswith("k")) == sorted(lines)


def test_kafkas_tools_read_the_offsets_topic(server):
    topic, group = name(), name()
    run(TOOLS + "ConsoleProducer", *server, "--topic", topic, stdin="x\n")
    run(TOOLS + "consumer.ConsoleConsumer", *server, "--topic", topic, "--group", group, "--from-beginning", "--max-messages", "1")
    out = run(TOOLS + "consumer.ConsoleConsumer", *server, "--topic", "__consumer_offsets", "--from-beginning",
              "--timeout-ms", "3000", "--formatter", "org.apache.kafka.tools.consumer.OffsetsMessageFormatter", check=False)
    assert group in out, out


def test_admin_tools(server, broker):
    versions = run(TOOLS + "BrokerApiVersionsCommand", *server)
    assert "Produce(0): 0 to 13" in versions and "UNSUPPORTED" in versions, versions
    assert "isFuture" in run(TOOLS + "LogDirsCommand", *server, "--describe")
    assert "Cluster ID" in run(TOOLS + "ClusterTool", "cluster-id", *server)
    topic = name()
    out = run(TOOLS + "ProducerPerformance", "--topic", topic, "--num-records", "50000", "--record-size", "1000",
              "--throughput", "-1", *server)
    assert "50000 records sent" in out, out
    out = run(TOOLS + "ConsumerPerformance", *server, "--topic", topic, "--num-records", "50000")
    assert ", 50000, " in out, out
