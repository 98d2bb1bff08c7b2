"""What is around three nodes fails: links, disks, clocks."""

import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time

import pytest
from cluster import PARTITIONS, Cluster, Load
from confluent_kafka import Consumer
from conftest import BINARY, ROOT, clean_environment, fail_writes_beyond


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


# The journal fails, and with it the shard; or segments alone, and copies begin anew and fail again.
@pytest.mark.parametrize("position", [4096, 6 << 20])
def test_a_node_whose_disk_fails_is_followed_by_others_and_comes_back_when_it_is_mended(make_cluster, position):
    cluster = make_cluster(settings={"journal.bytes": 33_554_432})
    cluster.create("t")
    load = Load(cluster, "t", digits=4000)
    time.sleep(2)
    node = cluster.node(1)
    fail_writes_beyond(node.process, position)
    cluster.wait("others lead", lambda: all(1 not in p.isrs for p in cluster.partitions("t").values()), 40)
    acked = len(load.acked)
    time.sleep(2)
    assert len(load.acked) > acked, "the others go on"
    node.kill()
    node.launch().wait_ready()
    cluster.wait_in_sync("t")
    assert load.finish() > 1_000


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
