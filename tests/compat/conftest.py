"""A broker of this checkout for every test that wants one: own folder, free port, stopped by pid."""

import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = pathlib.Path(os.environ.get("MILLRACE_TEST_BINARY", ROOT / "target" / "debug" / "millrace"))

# What client suites expect to be able to set; and two shards on any machine, so that requests cross between them.
SUITE_SETTINGS = {
    "cores": "2",
    "num.partitions": "3",
    "group.min.session.timeout.ms": "1000",
    "group.initial.rebalance.delay.ms": "0",
}


def free_port():
    """A port below those that the system gives to outgoing connections: a client that reconnects while the broker is
    down would take one of theirs away."""
    while True:
        port = random.randrange(10_000, 20_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


class Broker:
    def __init__(self, settings=None, args=(), data_dir=None, **process):
        self.settings = {**SUITE_SETTINGS, **(settings or {})}
        self.args = list(args)
        self.data_dir = data_dir or tempfile.mkdtemp(prefix="millrace-test-")
        self.port = free_port()
        self.process = None
        # How its process is started, if otherwise than here.
        self.process_options = process
        self.log = tempfile.NamedTemporaryFile("w+", prefix="millrace-log-", suffix=".txt", delete=False)

    def start(self, timeout=30):
        command = [str(BINARY), "serve", "--data-dir", self.data_dir, "--kafka-listen", f"127.0.0.1:{self.port}"]
        for name, value in self.settings.items():
            command += ["--set", f"{name}={value}"]
        began = time.monotonic()
        options = {"stderr": self.log, "env": clean_environment(), "restore_signals": False, **self.process_options}
        self.process = subprocess.Popen(command + self.args, stdout=subprocess.PIPE, text=True, **options)
        line = self.process.stdout.readline()
        self.start_seconds = time.monotonic() - began
        match = re.search(r"ready, Kafka clients connect to 127\.0\.0\.1:(\d+)", line)
        if not match:
            self.process.wait(timeout)
            raise RuntimeError(f"the broker did not start: {line!r}\n{self.log_text()}")
        self.port = int(match.group(1))
        return self

    @property
    def bootstrap(self):
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self):
        return self.process.pid

    def kill(self):
        self.process.kill()
        self.process.wait(30)

    def stop(self, timeout=30):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def rss_mib(self):
        with open(f"/proc/{self.pid}/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS:"))

    def log_text(self):
        self.log.flush()
        return pathlib.Path(self.log.name).read_text()

    def cleanup(self):
        if self.process and self.process.poll() is None:
            self.kill()
        text = self.log_text()
        self.log.close()
        os.unlink(self.log.name)
        shutil.rmtree(self.data_dir, ignore_errors=True)
        assert "panicked" not in text, text


def fail_writes_beyond(process, position):
    """From here on its disk fails to write at and beyond this byte of any file, standard error's too, until it is started again."""
    # The signal that this sends is ignored here, and there by `restore_signals`: then the write itself fails.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (position, resource.RLIM_INFINITY))


def clean_environment():
    return {k: v for k, v in os.environ.items() if not k.startswith("MILLRACE_") or k == "MILLRACE_LOG"}


@pytest.fixture
def make_broker():
    made = []

    def make(**kwargs):
        broker = Broker(**kwargs)
        made.append(broker)
        return broker.start()

    yield make
    for broker in made:
        broker.cleanup()


@pytest.fixture(scope="module")
def broker():
    broker = Broker().start()
    yield broker
    assert broker.process.poll() is None, "the broker is gone: " + broker.log_text()
    assert broker.stop() == 0, broker.log_text()
    broker.cleanup()


@pytest.fixture
def make_cluster():
    # It imports this module.
    from cluster import Cluster

    made = []

    def make(**kwargs):
        made.append(Cluster(**kwargs))
        return made[-1]

    yield make
    for cluster in made:
        cluster.cleanup()
