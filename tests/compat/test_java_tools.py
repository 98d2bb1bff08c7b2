"""Kafka's own Java clients and tools, unmodified, against a broker of this checkout."""

import json
import os
import pathlib
import subprocess
import time
import uuid

import pytest

from conftest import BINARY

LIB = pathlib.Path(os.environ.get("MILLRACE_TEST_JAVA_LIB", ""))
pytestmark = pytest.mark.skipif(not LIB.is_dir(), reason="scripts/test.sh fetches the jars and names their folder")

TOOLS = "org.apache.kafka.tools."

# Left out until compacted topics exist: Streams' WordCountDemo and StreamsSmokeTest, whose state lives in them.


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


def test_kafkas_own_client_compatibility_test(make_broker):
    # It wants a broker without topics. A record larger than a fetch is returned, as since KIP-74.
    answers = {
        "offsets-for-times-supported": "True", "cluster-id-supported": "True", "create-topics-supported": "True",
        "describe-acls-supported": "True", "describe-configs-supported": "True",
        "idempotent-producer-supported": "True", "expect-record-too-large-exception": "False",
        "num-cluster-nodes": "1",
    }
    options = [word for name, value in answers.items() for word in (f"--{name}", value)]
    out = run(TOOLS + "ClientCompatibilityTest", "--bootstrap-server", make_broker().bootstrap,
              "--topic", name(), *options)
    assert "SUCCESS" in out, out


def test_connects_file_connectors(broker, tmp_path):
    """Standalone: a distributed worker keeps its state in compacted topics."""
    lines = [f"line {n}" for n in range(2000)]
    (tmp_path / "in.txt").write_text("".join(line + "\n" for line in lines))
    topic, out = name(), tmp_path / "out.txt"
    run(TOOLS + "TopicCommand", "--bootstrap-server", broker.bootstrap, "--create", "--topic", topic, "--partitions", "1")
    files = {
        "worker": f"""bootstrap.servers={broker.bootstrap}
key.converter=org.apache.kafka.connect.storage.StringConverter
value.converter=org.apache.kafka.connect.storage.StringConverter
offset.storage.file.filename={tmp_path}/offsets
listeners=http://127.0.0.1:0
""",
        "source": f"name=source\nconnector.class=FileStreamSource\nfile={tmp_path}/in.txt\ntopic={topic}\n",
        "sink": f"name=sink\nconnector.class=FileStreamSink\nfile={out}\ntopics={topic}\n",
    }
    for file, text in files.items():
        (tmp_path / f"{file}.properties").write_text(text)
    with open(tmp_path / "connect.log", "w") as log:
        process = subprocess.Popen(
            ["java", "-Xmx256m", "-XX:TieredStopAtLevel=1", "-cp", f"{LIB}/*",
             "org.apache.kafka.connect.cli.ConnectStandalone",
             *(str(tmp_path / f"{file}.properties") for file in files)],
            stdout=log, stderr=log,
        )
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and not (out.exists() and len(out.read_text().splitlines()) >= len(lines)):
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait(30)
    assert out.read_text().splitlines() == lines, (tmp_path / "connect.log").read_text()[-3000:]


def test_an_export_of_a_killed_and_damaged_folder_is_read_by_kafkas_tools(make_broker, tmp_path):
    broker = make_broker(settings={"num.partitions": "1"})
    lines = "".join(f"line {n}\n" for n in range(500))
    subprocess.run(["kcat", "-b", broker.bootstrap, "-P", "-t", "saved", "-X", "batch.num.messages=10"], input=lines, text=True,
                   check=True, timeout=60)
    broker.kill()

    def export(to):
        return subprocess.run([BINARY, "export", "--data-dir", broker.data_dir, "--to", to], capture_output=True, text=True)

    done = export(tmp_path / "whole")
    assert (done.returncode, done.stderr) == (0, ""), done
    assert "saved-0: offsets 0 to 500, 500 records" in done.stdout, done.stdout
    assert "is there already" in export(tmp_path / "whole").stderr
    log = tmp_path / "whole" / "saved-0" / "00000000000000000000.log"
    dumped = run(TOOLS + "DumpLogSegments", "--files", log, "--print-data-log")
    assert [p.split("payload: ")[1] for p in dumped.splitlines() if "payload: " in p] == lines.splitlines()

    broker.start()
    assert "in use by a broker" in export(tmp_path / "running").stderr
    assert broker.stop() == 0
    # The metadata log has a segment too.
    segment, = (path for path in pathlib.Path(broker.data_dir).glob("logs/*/0/00000000000000000000.segment")
                if b"line 250" in path.read_bytes())
    stored = bytearray(segment.read_bytes())
    place = stored.index(b"line 250")
    stored[place] ^= 1
    segment.write_bytes(stored)
    done = export(tmp_path / "rest")
    assert done.returncode == 2 and f"{segment.name} at byte" in done.stderr and "are lost" in done.stderr, done
    log = tmp_path / "rest" / "saved-0" / "00000000000000000000.log"
    dumped = run(TOOLS + "DumpLogSegments", "--files", log, "--print-data-log")
    saved = [p.split("payload: ")[1] for p in dumped.splitlines() if "payload: " in p]
    assert "line 250" not in saved and 490 <= len(saved) < 500 and saved[-1] == "line 499"
    before = [line for line in saved if int(line.split()[1]) < 250]

    # The broker starts, since nothing reads old segments then; a reader that meets the damage is told, and so are producers.
    broker.start()
    def read(offset):
        # Clients try for ever; what they print until then counts.
        return subprocess.run(["timeout", "3", "kcat", "-b", broker.bootstrap, "-C", "-u", "-t", "saved", "-e", "-o", offset],
                              capture_output=True, text=True).stdout.splitlines()

    assert read("beginning") == before
    assert read("-100") == lines.splitlines()[-100:]
    assert "millrace export" in broker.log_text() and segment.name in broker.log_text()
    sent = subprocess.run(["kcat", "-b", broker.bootstrap, "-P", "-t", "saved", "-X", "message.timeout.ms=2000"], input="no\n",
                          capture_output=True, text=True, timeout=60)
    assert sent.returncode != 0, sent
