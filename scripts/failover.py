#!/usr/bin/env python3
"""How long a partition takes no writes when its leader is killed, or stopped: the longest pause between acknowledgements of a
producer (acks=all, one record each 2 ms) around each kill. Needs confluent-kafka (scripts/test.sh installs it into
target/test-tools/venv).

    scripts/failover.py [--rounds 20] [--signal KILL|TERM] [--partitions 1]
"""

import argparse
import os
import pathlib
import subprocess
import sys
import threading
import time

from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

SCRIPT = pathlib.Path(__file__).with_name("cluster-local.sh")


def cluster(*arguments):
    done = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}: {done.stderr}")
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--partitions", type=int, default=1, help="of the topic; all but the first are idle")
    options = parser.parse_args()
    bootstrap = cluster("up", "3", "--cores", "1", "--memory", "512MiB").split()[-1]
    try:
        measure(options, bootstrap)
    finally:
        cluster("down")


def measure(options, bootstrap):
    # By default librdkafka (2.16) goes back to the bootstrap addresses while brokers are away, and may lose a request on the way
    # (tests/compat/test_python_clients.py): who watches is not to be what is measured.
    admin = AdminClient({"bootstrap.servers": bootstrap, "metadata.recovery.strategy": "none"})
    admin.create_topics([NewTopic("t", options.partitions, 3)])["t"].result(60)
    acks, failures, stop = [], [], threading.Event()

    def produce():
        producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "log_level": 0,
                "enable.idempotence": True,
                "linger.ms": 0,
                "retry.backoff.ms": 10,
                "retry.backoff.max.ms": 50,
                "reconnect.backoff.ms": 10,
                "reconnect.backoff.max.ms": 100,
                "topic.metadata.refresh.fast.interval.ms": 20,
            }
        )

        def done(error, _):
            acks.append(time.monotonic()) if error is None else failures.append(str(error))

        while not stop.is_set():
            producer.produce("t", b"x" * 100, partition=0, on_delivery=done)
            producer.poll(0)
            time.sleep(0.002)
        producer.flush(30)

    def state():
        return admin.list_topics("t", timeout=10).topics["t"].partitions

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    # librdkafka asks for its producer id half a second after its start, and may have to ask again.
    while not acks:
        time.sleep(0.05)
    pauses, others = [], []
    for round_number in range(options.rounds):
        while any(len(p.isrs) < 3 for p in state().values()):
            time.sleep(0.05)
        time.sleep(0.7)
        victim = state()[0].leader
        began = time.monotonic()
        cluster("kill" if options.signal == "KILL" else "stop", str(victim))
        while any(p.leader in (-1, victim) for p in state().values()):
            time.sleep(0.01)
        others.append(time.monotonic() - began)
        elsewhere = time.monotonic()
        while acks[-1] < elsewhere:
            time.sleep(0.05)
        time.sleep(0.5)
        around = [t for t in acks if t > began - 0.1]
        pauses.append(max(b - a for a, b in zip(around, around[1:])))
        print(f"round {round_number + 1}: {pauses[-1] * 1000:.0f} ms", flush=True)
        pid = int((pathlib.Path(os.environ.get("CLUSTER_DIR", "target/cluster-local")) / str(victim) / "pid").read_text())
        while os.path.exists(f"/proc/{pid}") and "State:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text():
            time.sleep(0.05)
        cluster("start", str(victim))
    stop.set()
    thread.join()
    pauses.sort()
    at = lambda q: pauses[min(len(pauses) - 1, int(len(pauses) * q))] * 1000
    print(
        f"{options.rounds} times SIG{options.signal}, {options.partitions} partitions: pause p50 {at(0.5):.0f} ms, p99 {at(0.99):.0f} ms, "
        f"all leaders elsewhere within {max(others) * 1000:.0f} ms; {len(acks)} acknowledged, {len(failures)} failed"
    )


main()
