"""A start that fails says why in words, and leaves the data folder as it found it."""

import ctypes
import platform
import signal
import socket
import struct
import subprocess
import time

import pytest
from cluster import free_ports
from conftest import BINARY, clean_environment

# The four calls by their numbers; those of io_uring are the same everywhere.
SYSTEM_CALLS = {
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "sched_setaffinity": {"x86_64": 203, "aarch64": 122}.get(platform.machine()),
}


def deny(number):
    """Has the kernel refuse a system call of this process from here on, with EPERM, as container runtimes do (seccomp(2))."""
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    load, jump_if_equal, answer = 0x20, 0x15, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | 1
    steps = [(load, 0, 0, 0), (jump_if_equal, 0, 1, number), (answer, 0, 0, refuse), (answer, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    libc = ctypes.CDLL(None)
    program = Program(len(steps), ctypes.addressof(code))
    assert libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0
    assert libc.prctl(set_seccomp, filter_mode, ctypes.byref(program), 0, 0) == 0


def run(*arguments, **options):
    command = [BINARY, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env=clean_environment(), **options)


@pytest.mark.parametrize("call", SYSTEM_CALLS)
def test_a_system_call_that_is_denied_is_named(tmp_path, call):
    if SYSTEM_CALLS[call] is None:
        pytest.skip("not known on this architecture")
    denied = {"preexec_fn": lambda: deny(SYSTEM_CALLS[call])}
    data = tmp_path / "data"
    doctor = run("doctor", "--data-dir", data, **denied)
    assert doctor.returncode == 1
    assert f"{call} is refused" in doctor.stdout, doctor.stdout
    served = run("serve", "--data-dir", data, "--kafka-listen", "127.0.0.1:0", **denied)
    assert served.returncode == 1
    assert f"{call} is refused" in served.stderr and "panicked" not in served.stderr, served.stderr
    assert not data.exists()


@pytest.fixture
def taken():
    """A port on which somebody listens already."""
    with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        udp.bind(tcp.getsockname())
        yield tcp.getsockname()[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--advertise", ":9092"], "--advertise takes HOST:PORT"),
        (["--kafka-listen", "127.0.0.1:{taken}"], "stop what listens there"),
        (["--memory", "1MiB"], "at least 64MiB"),
        (["--node-id", "3", "--cluster-listen", "127.0.0.1:{free}", "--peers", "1@127.0.0.1:{free}"], "not among them"),
        (["--node-id", "1", "--cluster-listen", "127.0.0.1:{taken}", "--peers", "1@127.0.0.1:{taken}"], "cannot listen on"),
        # It would found a cluster.
        (
            ["--node-id", "1", "--cluster-listen", "127.0.0.1:{free}", "--peers", "1@127.0.0.1:{free}", "--kafka-listen", "127.0.0.1:{taken}"],
            "stop what listens there",
        ),
    ],
)
@pytest.mark.parametrize("is_there", [False, True])
def test_a_refused_start_leaves_nothing(tmp_path, taken, options, said, is_there):
    data = tmp_path / "data"
    if is_there:
        data.mkdir()
    (free,) = free_ports(1)
    options = [option.format(taken=taken, free=free) for option in options]
    if "--kafka-listen" not in options:
        options += ["--kafka-listen", "127.0.0.1:0"]
    refused = run("serve", "--data-dir", data, *options)
    assert refused.returncode == 1
    assert said in refused.stderr, refused.stderr
    assert data.exists() == is_there
    assert not is_there or not list(data.iterdir())


def test_a_node_that_found_no_cluster_can_be_another(tmp_path):
    ports = free_ports(3)
    peers = ",".join(f"{n}@127.0.0.1:{port}" for n, port in enumerate(ports, 1))
    for number in (1, 2):
        process = subprocess.Popen(
            [BINARY, "serve", "--data-dir", tmp_path / "data", "--node-id", str(number), "--memory", "64MiB", "--cores", "1"]
            + ["--kafka-listen", "127.0.0.1:0", "--cluster-listen", f"127.0.0.1:{ports[number - 1]}", "--peers", peers],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=clean_environment(),
        )
        try:
            time.sleep(2)
            assert process.poll() is None, process.stderr.read()
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=15)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == 0 and "waiting for a cluster" in log, log
        assert not (tmp_path / "data").exists()


def test_clients_go_on_to_the_next_broker_while_a_node_waits_for_its_cluster(tmp_path):
    kafka, *ports = free_ports(3)
    peers = ",".join(f"{n}@127.0.0.1:{port}" for n, port in enumerate(ports, 1))
    process = subprocess.Popen(
        [BINARY, "serve", "--data-dir", tmp_path / "data", "--node-id", "1", "--memory", "64MiB", "--cores", "1"]
        + ["--kafka-listen", f"127.0.0.1:{kafka}", "--cluster-listen", f"127.0.0.1:{ports[0]}", "--peers", peers],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=clean_environment(),
    )
    try:
        time.sleep(1.5)
        with socket.socket() as client, pytest.raises(ConnectionRefusedError):
            client.connect(("127.0.0.1", kafka))
    finally:
        process.kill()
        process.wait()
