"""Where nodes hear each other: which ports they take, and what is said of addresses that nobody could use."""

import pathlib
import signal
import socket
import subprocess

import pytest
from cluster import free_ports
from conftest import BINARY, clean_environment


def command(data, number, port, peers, *more):
    listens = ["--kafka-listen", "127.0.0.1:0", "--cluster-listen", f"127.0.0.1:{port}", "--peers", peers]
    return [BINARY, "serve", "--data-dir", data, "--node-id", str(number), "--memory", "64MiB", *listens, *more]


def run(*arguments):
    return subprocess.run(list(map(str, arguments)), capture_output=True, text=True, timeout=30, env=clean_environment())


def udp_ports():
    lines = pathlib.Path("/proc/net/udp").read_text().splitlines()[1:]
    return {int(line.split()[1].split(":")[1], 16) for line in lines}


def test_each_shard_takes_the_port_behind_the_one_before(tmp_path):
    (port,) = free_ports(1)
    one = f"1@127.0.0.1:{port}"
    node = subprocess.Popen(
        command(tmp_path / "1", 1, port, one, "--cores", "3"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment()
    )
    try:
        assert "ready" in node.stdout.readline()
        assert {port, port + 1, port + 2} <= udp_ports() and port + 3 not in udp_ports()

        # Another one too close to it is told whose ports are in the way.
        between = port + 1
        close = run(*command(tmp_path / "2", 2, between, f"{one},2@127.0.0.1:{between}"))
        assert close.returncode == 1
        assert f"cannot listen on 127.0.0.1:{between}" in close.stderr and "shard 0 of " in close.stderr, close.stderr
        node.send_signal(signal.SIGTERM)
        assert node.wait(20) == 0
    finally:
        node.kill()
        node.wait()

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", port + 1))
        close = run(*command(tmp_path / "3", 1, port, one, "--cores", "2"))
    assert close.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port + 1}" in close.stderr and "shard 1 of 2" in close.stderr, close.stderr

    last = run(*command(tmp_path / "4", 1, 65535, "1@127.0.0.1:65535", "--cores", "2"))
    assert last.returncode == 1 and "no ports beyond 65535" in last.stderr, last.stderr


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (":{port}", "no host"),
        ("127.0.0.1", "no port"),
        ("127.0.0.1:", "no port"),
        ("127.0.0.1:0", "any port"),
        ("127.0.0.1:70000", "from 1 to 65535"),
        ("::1:{port}", "in brackets"),
    ],
)
def test_addresses_that_nobody_can_use_are_refused_by_name(tmp_path, address, said):
    (port,) = free_ports(1)
    address = address.format(port=port)
    common = [BINARY, "serve", "--data-dir", tmp_path / "data", "--kafka-listen", "127.0.0.1:0", "--node-id", "1"]
    listen = run(*common, "--cluster-listen", address, "--peers", f"1@127.0.0.1:{port}")
    peers = run(*common, "--cluster-listen", f"127.0.0.1:{port}", "--peers", f"1@127.0.0.1:{port},2@{address}")
    bootstrap = run(BINARY, "cluster", "status", "--bootstrap", address)
    for refused, setting in ((listen, "cluster.listen"), (peers, "peers"), (bootstrap, "--bootstrap")):
        assert refused.returncode == 1
        assert setting in refused.stderr and address in refused.stderr and said in refused.stderr, refused.stderr


def test_nodes_speak_ipv6(tmp_path):
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("there is no IPv6")
    ports = free_ports(2)
    peers = ",".join(f"{n}@[::1]:{port}" for n, port in enumerate(ports, 1))
    nodes = []
    try:
        for number, port in enumerate(ports, 1):
            arguments = command(tmp_path / str(number), number, port, peers, "--cores", "2")
            arguments[arguments.index(f"127.0.0.1:{port}")] = f"[::1]:{port}"
            arguments[arguments.index("127.0.0.1:0")] = "[::1]:0"
            nodes.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=clean_environment()))
        at = [node.stdout.readline().split()[-1] for node in nodes]
        status = run(BINARY, "cluster", "status", "--bootstrap", at[1])
        assert status.returncode == 0, status.stderr
    finally:
        for node in nodes:
            node.kill()
            node.wait()
