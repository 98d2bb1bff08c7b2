"""Certificates of nodes: they end, and they can be revoked."""

import os
import pathlib
import subprocess

import pytest
from conftest import BINARY, clean_environment

FAKETIME = next(iter(pathlib.Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)


def make(*arguments):
    done = subprocess.run([BINARY, "cluster", *map(str, arguments)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout


def certified(ca, number, crl=None):
    """The settings that name a node's certificates."""
    files = {"ca": "ca.pem", "cert": f"node-{number}.pem", "key": f"node-{number}.key"}
    if crl:
        files["crl"] = crl
    return [a for name, file in files.items() for a in ("--set", f"cluster.tls.{name}={ca / file}")]


def test_a_revoked_node_reaches_nobody_and_comes_back_with_another_certificate(make_cluster):
    cluster = make_cluster(start=False)
    ca = cluster.dir / "ca"
    make("init-ca", "--dir", ca)
    for number in (1, 2, 3):
        make("issue", "--dir", ca, "--node-id", number)
    for node in cluster.nodes:
        node.launch(*certified(ca, node.number))
    for node in cluster.nodes:
        node.wait_ready()
    cluster.create("t", 3)

    told = make("revoke", "--dir", ca, ca / "node-3.pem")
    assert "lists 1 revoked" in told and "cluster.tls.crl" in told, told
    third = cluster.node(3)
    third.kill()
    for number in (1, 2):
        node = cluster.node(number)
        node.kill()
        node.launch(*certified(ca, number, crl="ca.crl")).wait_ready()
    third.launch(*certified(ca, 3))
    cluster.wait("it is refused", lambda: "invalid peer certificate: Revoked" in third.log_text())
    cluster.wait("it is fenced", lambda: all(3 not in p.isrs for p in cluster.partitions("t").values()))
    third.kill()

    (ca / "node-3.pem").rename(ca / "revoked.pem")
    (ca / "node-3.key").rename(ca / "revoked.key")
    make("issue", "--dir", ca, "--node-id", 3)
    third.launch(*certified(ca, 3, crl="ca.crl")).wait_ready()
    cluster.wait_in_sync("t")


@pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime")
def test_a_certificate_that_ends_is_told_of_before_and_refused_after(tmp_path):
    ca = tmp_path / "ca"
    make("init-ca", "--dir", ca)
    make("issue", "--dir", ca, "--node-id", 1, "--days", 40)

    def serve(days):
        environment = {**clean_environment(), "LD_PRELOAD": str(FAKETIME), "FAKETIME": f"+{days}d"}
        options = ["--data-dir", tmp_path / "data", "--kafka-listen", "127.0.0.1:0", "--node-id", "1"]
        # The others of its cluster are not there: it waits for them.
        options += ["--cluster-listen", "127.0.0.1:29999", "--peers", "1@127.0.0.1:29999,2@127.0.0.1:29899"]
        command = [str(BINARY), "serve", *map(str, options), *certified(ca, 1)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=6)
            return done.returncode, done.stderr
        except subprocess.TimeoutExpired as late:
            return None, (late.stderr or b"").decode()

    status, log = serve(5)
    assert status is None and "ends soon" not in log, log
    status, log = serve(20)
    assert status is None and "ends soon" in log and "days_left=19" in log, log
    status, log = serve(41)
    assert status == 1 and "node-1.pem: it is valid from" in log and "millrace cluster issue" in log, log
