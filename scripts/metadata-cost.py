#!/usr/bin/env python3
"""What creating topics costs by the element: one CreateTopics of 100, 1,000, … topics after the other, then one topic more, then
auto-creation of 2,000 and 100,000 names that no topic may have. Costs that grow from line to line grow with the topics that are there.

    scripts/metadata-cost.py [--binary target/release/millrace] [COUNT …]
"""

import argparse
import pathlib
import struct
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/compat"))

import conftest  # noqa: E402
from test_bad_input import answer, connect  # noqa: E402
from test_many_elements import create, metadata  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=ROOT / "target/release/millrace", type=pathlib.Path)
    parser.add_argument("counts", nargs="*", type=int, default=[100, 1_000, 10_000, 80_000])
    options = parser.parse_args()
    conftest.BINARY = options.binary
    broker = conftest.Broker(settings={"memory": "1GiB"}).start()
    connection = connect(broker)
    connection.settimeout(600)

    def timed(what, count, request):
        began = time.monotonic()
        connection.sendall(request)
        answer(connection)
        took = time.monotonic() - began
        print(f"{what:40} {count:>7}  {took:7.3f} s  {1e6 * took / count:8.1f} us each", flush=True)

    for count in options.counts:
        timed("CreateTopics", count, create([f"t-{count}-{n}" for n in range(count)]))
        timed("one more", 1, create([f"one-more-{count}"]))
    timed("auto-creation by Metadata", 2_000, metadata([f"auto-{n}" for n in range(2_000)]))
    timed("Metadata of names that cannot be", 100_000, metadata([f"bad name {n}" for n in range(100_000)]))
    began = time.monotonic()
    broker.kill()
    broker.start(120)
    print(f"started again after kill -9 in {time.monotonic() - began:.1f} s, {broker.rss_mib():.0f} MiB")
    broker.stop(60)
    broker.cleanup()


if __name__ == "__main__":
    main()
