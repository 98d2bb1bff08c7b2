"""The harness, end to end, against a broker of this checkout: what it writes must add up."""

import json
import os
import pathlib
import subprocess

import pytest
from conftest import BINARY

BENCH = BINARY.with_name("millrace-bench")


@pytest.mark.skipif(not BENCH.exists(), reason="the workspace's binaries are not built")
def test_compare_writes_results_and_a_report(tmp_path):
    done = subprocess.run(
        [BENCH, "compare", "--no-kafka", "--millrace", BINARY, "--dir", tmp_path, "--rounds", "2", "--seconds", "1",
         "--warm-up", "0", "--memory", "256m", "--only", "end-to-end", "--only", "full-1k-16k"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*.json")]
    # Two workloads, durable, relaxed and with core endpoints, and one of them against the floor, flushed and not; two rounds.
    assert len(runs) == 16, done.stdout + done.stderr
    for run in runs:
        workload = run["workload"]
        if workload["rate"]:
            # A slow machine may spoil a run, which then says so; it may not lose records silently.
            assert run["produce"]["count"] == workload["rate"] or run["invalid"], run
            assert 0 < run["produce"]["p50"] <= run["produce"]["p99"] <= run["produce"]["max"]
        if workload["consumers"]:
            assert run["end_to_end"]["count"] == run["produce"]["count"] or run["invalid"], run
        assert run["broker"]["cpu_s"] > 0 and run["broker"]["resident"] > 5 << 20 and run["broker"]["written"] > 0
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page and "Millrace, relaxed flush" in page
    assert "https://" not in page and "<script" not in page, "the page must need nothing but itself"
    assert "(`end-to-end`)" in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "broker").exists(), "the brokers' folders stay behind"


@pytest.mark.skipif(not BENCH.exists(), reason="the workspace's binaries are not built")
def test_compare_with_three_nodes_counts_all_of_them(tmp_path):
    done = subprocess.run(
        [BENCH, "compare", "--nodes", "3", "--no-kafka", "--millrace", BINARY, "--dir", tmp_path, "--rounds", "1",
         "--seconds", "1", "--warm-up", "1", "--memory", "256m", "--only", "full-1k-16k"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*.json")]
    assert sorted(run["variant"] for run in runs) == ["Millrace", "Millrace, relaxed flush"], done.stdout + done.stderr
    for run in runs:
        assert run["workload"]["replicas"] == 3
        if run["variant"] == "Millrace":
            # A group or two may be acknowledged a moment before the measured time begins.
            assert run["broker"]["written"] > 2.5 * run["mb_per_s"] * 1e6, "each of three nodes writes all"
    assert "every partition has 3 replicas" in (tmp_path / "report.md").read_text()
