"""A node that waits for the others of --peers."""

import signal
import subprocess
import time

from cluster import free_ports
from conftest import BINARY, clean_environment


def test_a_node_that_waits_for_its_peers_can_be_stopped(tmp_path):
    kafka, *peers = free_ports(4)
    nodes = ",".join(f"{n}@127.0.0.1:{port}" for n, port in enumerate(peers, 1))
    process = subprocess.Popen(
        [BINARY, "serve", "--data-dir", tmp_path / "data", "--kafka-listen", f"127.0.0.1:{kafka}", "--node-id", "1",
         "--cluster-listen", f"127.0.0.1:{peers[0]}", "--peers", nodes, "--memory", "128MiB", "--cores", "1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=clean_environment(),
    )
    try:
        time.sleep(3)
        assert process.poll() is None, "it waits"
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=15)
    finally:
        process.kill()
        process.wait()
    assert "panicked" not in log, log
    assert process.returncode == 0, log
