"""A broker in a control group that limits memory or CPU time, as containers do."""

import os
import pathlib
import subprocess
import time
import uuid

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, ConfigResource
from conftest import BINARY, clean_environment

MIB = 1 << 20


class Group:
    """A control group below this process's own, of version 1 or 2."""

    def __init__(self, controller):
        mounts = [line.split() for line in pathlib.Path("/proc/mounts").read_text().splitlines()]
        name = f"millrace-test-{uuid.uuid4()}"
        for _, point, kind, options, *_ in mounts:
            self.folder = pathlib.Path(point, name)
            self.is_2 = kind == "cgroup2"
            if self.is_2 and controller in pathlib.Path(point, "cgroup.subtree_control").read_text().split():
                break
            if kind == "cgroup" and controller in options.split(","):
                break
        else:
            pytest.skip(f"no hierarchy of control groups has {controller}")
        try:
            self.folder.mkdir()
        except OSError as error:
            pytest.skip(f"control groups cannot be made here: {error}")

    def write(self, file, value):
        (self.folder / file).write_text(str(value))

    def limit_memory(self, limit):
        self.write("memory.max" if self.is_2 else "memory.limit_in_bytes", limit)

    def limit_cpu(self, cores):
        if self.is_2:
            self.write("cpu.max", f"{100_000 * cores} 100000")
        else:
            self.write("cpu.cfs_quota_us", 100_000 * cores)

    def enter(self):
        """In the child, before it runs the program."""
        self.write("cgroup.procs", os.getpid())

    def run(self, *arguments):
        return subprocess.run(
            [BINARY, *map(str, arguments)], preexec_fn=self.enter, env=clean_environment(), capture_output=True, text=True, timeout=30
        )

    def remove(self):
        for _ in range(100):
            try:
                return self.folder.rmdir()
            except OSError:
                # Its last process is still being taken apart.
                time.sleep(0.05)


@pytest.fixture
def make_group():
    made = []

    def make(controller):
        made.append(Group(controller))
        return made[-1]

    # Brokers that a test makes after this are gone before it.
    yield make
    for group in made:
        group.remove()


def test_the_default_memory_fits_into_the_container(make_group, make_broker):
    group = make_group("memory")
    group.limit_memory(256 * MIB)
    broker = make_broker(preexec_fn=group.enter)
    admin, asked = AdminClient({"bootstrap.servers": broker.bootstrap}), ConfigResource("broker", "0")
    configs = admin.describe_configs([asked])[asked].result(10)
    assert configs["memory"].value == "128MiB"
    assert "256 MiB" in group.run("doctor", "--data-dir", broker.data_dir).stdout

    # More than all of the limit: what stays in memory of it is bounded.
    producer = Producer({"bootstrap.servers": broker.bootstrap, "linger.ms": 20, "compression.type": "none"})
    record = os.urandom(100_000)
    for _ in range(4_500):
        while True:
            try:
                producer.produce("t", record)
                break
            except BufferError:
                producer.poll(0.1)
    assert producer.flush(60) == 0
    assert broker.process.poll() is None, "it was killed for the memory it took"


def test_more_memory_than_the_container_has_is_refused_in_words(make_group, tmp_path):
    group = make_group("memory")
    group.limit_memory(256 * MIB)
    refused = group.run("serve", "--data-dir", tmp_path / "data", "--kafka-listen", "127.0.0.1:0", "--memory", "512MiB")
    assert refused.returncode == 1
    assert "512 MiB" in refused.stderr and "256 MiB" in refused.stderr and "128MiB" in refused.stderr, refused.stderr


def test_a_quota_of_cpu_time_counts_as_fewer_cores(make_group, tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one core")
    group = make_group("cpu")
    group.limit_cpu(1)
    cores = next(line for line in group.run("doctor", "--data-dir", tmp_path).stdout.splitlines() if line.split()[1] == "cores")
    assert "the time of 1 may be used" in cores, cores
