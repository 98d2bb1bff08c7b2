"""Clients of other languages, and the integration suite that kafka-python's own authors wrote."""

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
GO = os.environ.get("MILLRACE_TEST_GO", "")
JS = os.environ.get("MILLRACE_TEST_JS", "")
RUST = os.environ.get("MILLRACE_TEST_RUST", "")
SUITE = os.environ.get("MILLRACE_TEST_KAFKA_PYTHON", "")

# What needs features that are not there yet; shortened as they come.
LEFT_OUT = [
    "test_create_describe_delete_acls",  # ACLs
    "test_transactional_producer",  # transactions
]


def run(*command, timeout=90):
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0 and "all read" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(not GO, reason="scripts/test.sh builds the programs and names their folder")
@pytest.mark.parametrize("client", ["franz", "sarama"])
def test_go(broker, client):
    run(pathlib.Path(GO) / client, broker.bootstrap)


@pytest.mark.skipif(not JS, reason="scripts/test.sh installs the client and names the folder")
def test_kafkajs(broker):
    run("node", pathlib.Path(JS) / "kafkajs.js", broker.bootstrap)


@pytest.mark.skipif(not RUST, reason="scripts/test.sh builds the program and names it")
def test_rdkafka_and_rskafka(make_broker):
    # The program counts offsets of topics that it expects to be new and of one partition.
    run(RUST, make_broker(settings={"num.partitions": "1"}).bootstrap)


@pytest.mark.skipif(not SUITE, reason="scripts/test.sh unpacks the suite and names its folder")
def test_kafka_pythons_own_suite(broker):
    suite = pathlib.Path(SUITE)
    # A kafka-python 3.0 consumer that subscribes while its bootstrap answer is arriving does not ask for the topic's
    # metadata before the metadata's age is over: five minutes, where its tests give up after 30 s.
    (suite / "test" / "__init__.py").write_text(
        "from kafka import KafkaConsumer\n\nKafkaConsumer.DEFAULT_CONFIG['metadata_max_age_ms'] = 1000\n"
    )
    # The source package lacks the module that starts servers; an external one needs only its names.
    (suite / "test" / "service.py").write_text(
        "class ExternalService:\n    def __init__(self, host, port):\n        self.host, self.port = host, port\n"
        "    def open(self):\n        pass\n    def close(self):\n        pass\n\n\nclass SpawnedService:\n    pass\n"
    )
    files = [f"test/integration/test_{part}_integration.py" for part in ("admin", "consumer", "producer")]
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "--tb=native", *files,
               "-k", " and ".join(f"not {name}" for name in LEFT_OUT)]
    environment = {**os.environ, "PYTHONPATH": str(suite), "KAFKA_ROOT": str(suite), "KAFKA_VERSION": "4.3.0",
                   "KAFKA_URI": f"kafka://{broker.bootstrap}"}
    done = subprocess.run(command, cwd=suite, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    print(done.stdout.strip().splitlines()[-1])
