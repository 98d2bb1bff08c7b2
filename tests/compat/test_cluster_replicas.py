"""Replicas of a partition: catching up, taking over, moving, damage, the closest one."""

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from cluster import PARTITIONS, Load, read_segments
from confluent_kafka import Consumer, ElectionType, Producer, TopicPartition
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource
from test_bad_input import connect
from test_fetch import fetch
from test_java_tools import LIB, TOOLS, run


def test_a_follower_catches_up_no_faster_than_it_may_while_others_are_served(make_cluster):
    cluster = make_cluster()
    cluster.create("bulk", 1)
    cluster.create("t")
    producer = Producer({"bootstrap.servers": cluster.bootstrap, "linger.ms": 20, "batch.size": 200_000})
    payload = os.urandom(10_000)
    for _ in range(1_600):
        producer.produce("bulk", payload)
        producer.poll(0)
    assert producer.flush(60) == 0
    partition = cluster.partitions("bulk")[0]
    lagging = cluster.node(next(n for n in partition.replicas if n != partition.leader))
    admin = cluster.admin()
    for node in cluster.nodes:
        rate = ConfigEntry("leader.replication.throttled.rate", "4000000", incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource("BROKER", str(node.number), incremental_configs=[rate])
        admin.incremental_alter_configs([resource])[resource].result(10)
    lagging.kill()
    shutil.rmtree(lagging.folder)
    begun = time.monotonic()
    lagging.launch().wait_ready()
    load = Load(cluster, "t")
    cluster.wait_in_sync("bulk")
    took = time.monotonic() - begun
    # 16 MB at 4 MB/s, less what goes at once; a debug build takes well under a second without a bound.
    assert took > 3, f"{took:.1f} s"
    assert load.finish() > 500
    assert load.longest_gap < 2, f"no acknowledgement for {load.longest_gap:.1f} s"


def test_replicas_that_are_enough_alone_take_over_and_the_last_one_standing_too(make_cluster):
    """KIP-966: of three replicas two go, one after the other; then the last one goes, and the second is back first."""
    cluster = make_cluster(count=5, settings={"offsets.topic.replication.factor": 5})
    cluster.create("t", 1)
    replicas = cluster.partitions("t")[0].replicas
    producer = Producer({"bootstrap.servers": cluster.bootstrap, "acks": "all", "enable.idempotence": True, "linger.ms": 0})
    acked = []

    def produce(count):
        for i in range(count):
            number = len(acked)
            producer.produce("t", str(number).encode(), on_delivery=lambda e, m: e or acked.append(m.value()))
            producer.flush(10)

    produce(100)
    third, second = (cluster.node(n) for n in replicas[:0:-1])
    third.kill()
    cluster.wait("it is out", lambda: len(cluster.partitions("t")[0].isrs) == 2)
    produce(100)
    second.kill()
    cluster.wait("it is out", lambda: len(cluster.partitions("t")[0].isrs) == 1)
    # What the leader takes alone is not acknowledged, and nobody reads it.
    admin = cluster.admin()
    alone = Producer({"bootstrap.servers": cluster.bootstrap, "acks": 1, "linger.ms": 0})
    alone.produce("t", b"alone")
    assert alone.flush(10) == 0

    def last():
        reader = Consumer({"bootstrap.servers": cluster.bootstrap, "group.id": "r"})
        try:
            return reader.get_watermark_offsets(TopicPartition("t", 0), timeout=10)[1]
        finally:
            reader.close()

    assert last() == 200
    cluster.node(replicas[0]).kill()
    # The third lacks some of it and must not lead; the second has all.
    third.launch().wait_ready()
    time.sleep(1)
    assert admin.list_topics("t", timeout=10).topics["t"].partitions[0].leader == -1
    second.launch().wait_ready()
    cluster.wait("it leads", lambda: cluster.partitions("t")[0].leader == replicas[1])
    cluster.wait("the third follows", lambda: len(cluster.partitions("t")[0].isrs) == 2)
    produce(100)
    assert len(acked) == 300
    assert last() == 300


def test_a_fetch_that_waits_is_answered_when_another_leads(make_cluster):
    """A consumer with nothing to read would otherwise look for the new leader only when its wait is over."""
    cluster = make_cluster()
    cluster.create("t", 1)
    leads = lambda: cluster.partitions("t")[0].leader
    preferred = cluster.node(leads())
    preferred.kill()
    cluster.wait("another leads", lambda: leads() not in (-1, preferred.number))
    preferred.launch().wait_ready()
    cluster.wait_in_sync("t")
    waits_at, admin = cluster.node(leads()), cluster.admin()
    assert waits_at is not preferred
    with connect(waits_at) as connection, ThreadPoolExecutor() as pool:
        begun = time.monotonic()
        not_leader = pool.submit(fetch, connection, "t", {0: 0}, wait_ms=9_000, expected_error=6)
        time.sleep(0.5)
        assert not not_leader.done()
        admin.elect_leaders(ElectionType.PREFERRED, None).result(20)
        assert not_leader.result(20) == {0: 0}
        assert time.monotonic() - begun < 6


def test_what_was_acknowledged_is_read_from_the_one_replica_that_is_back(make_cluster):
    """Both replicas die, and one returns: fewer than min.insync.replicas, but what it knew to be agreed on is there to be read."""
    cluster = make_cluster()
    cluster.create("t", 1, replicas=2)
    leader, follower = (cluster.node(n) for n in cluster.partitions("t")[0].replicas)
    producer = Producer({"bootstrap.servers": cluster.bootstrap, "acks": "all"})
    for i in range(100):
        producer.produce("t", str(i).encode())
    assert producer.flush(10) == 0
    # It is noted every five seconds.
    time.sleep(7)
    follower.kill()
    cluster.wait("it is out", lambda: len(cluster.partitions("t")[0].isrs) == 1)
    leader.kill()
    leader.launch().wait_ready()
    cluster.wait("it leads again", lambda: cluster.partitions("t")[0].leader == leader.number)
    reader = Consumer({"bootstrap.servers": cluster.bootstrap, "group.id": "r"})
    reader.assign([TopicPartition("t", 0, 0)])
    found, until = [], time.monotonic() + 20
    while len(found) < 100 and time.monotonic() < until:
        found += [m.value() for m in reader.consume(100, 0.2) if not m.error()]
    reader.close()
    assert found == [str(i).encode() for i in range(100)], cluster.logs()


@pytest.mark.skipif(not LIB, reason="Kafka's tools are not installed")
@pytest.mark.parametrize("damage", ["a byte", "the file"])
def test_a_leader_whose_log_is_damaged_is_followed_by_another(make_cluster, damage):
    cluster = make_cluster()
    cluster.create("t", 1)
    producer = Producer({"bootstrap.servers": cluster.bootstrap, "linger.ms": 0})
    for n in range(300):
        producer.produce("t", f"{n:06}".encode() * 20)
        producer.poll(0.001)
    assert producer.flush(20) == 0
    leader = cluster.node(cluster.partitions("t")[0].leader)
    leader.signal(signal.SIGTERM)
    assert leader.process.wait(30) == 0
    segments = [p for p in leader.folder.glob("logs/*/0/*.segment") if b"000200" in p.read_bytes()]
    assert len(segments) == 1
    if damage == "a byte":
        content = bytearray(segments[0].read_bytes())
        content[content.index(b"000200")] ^= 1
        segments[0].write_bytes(content)
    else:
        segments[0].unlink()
    leader.launch().wait_ready()
    cluster.wait_in_sync("t")
    preferred = ["--election-type", "preferred", "--all-topic-partitions"]
    run(TOOLS + "LeaderElectionCommand", "--bootstrap-server", cluster.bootstrap, *preferred)
    cluster.wait("it leads again", lambda: cluster.partitions("t")[0].leader == leader.number)

    consumer = Consumer(
        {"bootstrap.servers": cluster.bootstrap, "group.id": "g", "auto.offset.reset": "error", "retry.backoff.ms": 50}
    )
    consumer.assign([TopicPartition("t", 0, 0)])
    got, until = [], time.monotonic() + 30
    while len(got) < 300 and time.monotonic() < until:
        got += [m.value()[:6] for m in consumer.consume(100, 0.5) if not m.error()]
    consumer.close()
    assert got == [f"{n:06}".encode() for n in range(300)], leader.log_text()
    assert "stored records are damaged" in leader.log_text()
    assert cluster.partitions("t")[0].leader != leader.number

    # The damaged copy begins anew and is in sync again, and whole; after a kill, too.
    cluster.wait_in_sync("t")
    assert "a copy has failed and begins anew" in leader.log_text()
    for _ in range(2):
        leader.kill()
        leader.launch().wait_ready()
        cluster.wait_in_sync("t")
    assert len(read_segments(leader, "t")) == 300


def test_a_consumer_reads_from_the_replica_in_its_rack(make_cluster):
    cluster = make_cluster(
        settings={"replica.selector.class": "org.apache.kafka.common.replica.RackAwareReplicaSelector"}, racks=True
    )
    cluster.create("t", 1)
    producer = Producer({"bootstrap.servers": cluster.bootstrap})
    for n in range(500):
        producer.produce("t", str(n).encode())
    assert producer.flush(20) == 0
    leader = cluster.partitions("t")[0].leader
    near = leader % 3 + 1
    fetches = {}

    def count(text):
        for broker in json.loads(text)["brokers"].values():
            fetches[broker["nodeid"]] = broker["req"].get("Fetch", 0)

    consumer = Consumer(
        {
            "bootstrap.servers": cluster.bootstrap,
            "group.id": "g",
            "client.rack": f"rack-{near}",
            "auto.offset.reset": "earliest",
            "statistics.interval.ms": 200,
            "stats_cb": count,
        }
    )
    consumer.assign([TopicPartition("t", 0, 0)])
    got, until = [], time.monotonic() + 20

    def read(want):
        while len(got) < want and time.monotonic() < until:
            got.extend(int(m.value()) for m in consumer.consume(100, 0.2) if not m.error())

    read(500)
    for n in range(500, 520):
        producer.produce("t", str(n).encode())
        producer.flush(5)
    read(520)
    assert got == list(range(520))
    consumer.consume(1, 1)
    assert fetches[near] > fetches[leader], fetches

    # Without its replica it goes back to the leader.
    cluster.node(near).kill()
    for n in range(520, 540):
        producer.produce("t", str(n).encode())
    assert producer.flush(20) == 0
    read(540)
    consumer.close()
    assert got == list(range(540))


def test_a_partition_moved_away_and_back_survives_a_kill(make_cluster):
    cluster = make_cluster(count=4)
    cluster.create("t")
    load = Load(cluster, "t")
    tool = [TOOLS + "reassign.ReassignPartitionsCommand", "--bootstrap-server", cluster.bootstrap, "--execute"]

    def move(nodes):
        plan = cluster.dir / "plan.json"
        wanted = [{"topic": "t", "partition": p, "replicas": nodes[p % 3 :] + nodes[: p % 3]} for p in range(PARTITIONS)]
        plan.write_text(json.dumps({"version": 1, "partitions": wanted}))
        run(*tool, "--reassignment-json-file", str(plan))
        there = lambda p: sorted(p.replicas) == sorted(nodes) and len(p.isrs) == 3
        cluster.wait("moved", lambda: all(there(p) for p in cluster.partitions("t").values()))

    move([1, 2, 3])
    move([2, 3, 4])
    move([1, 2, 3])
    for number in (1, 2):
        cluster.node(number).kill()
        time.sleep(0.3)
        cluster.node(number).launch().wait_ready()
        cluster.wait_in_sync("t")
    assert load.finish() > 1_000
    # The first leads all of it now and shows its own copy.
    for number in (2, 3):
        cluster.node(number).kill()
        cluster.wait("others lead", lambda: all(p.leader not in (-1, number) for p in cluster.partitions("t").values()))
        if number == 2:
            cluster.node(2).launch().wait_ready()
            cluster.wait_in_sync("t")
    load.check()


def test_leaderships_handed_over_under_load_write_nothing_twice(make_cluster):
    cluster = make_cluster()
    cluster.create("t")
    load, admin = Load(cluster, "t", producers=4), cluster.admin()
    tool = [TOOLS + "reassign.ReassignPartitionsCommand", "--bootstrap-server", cluster.bootstrap, "--execute"]
    for turn in range(6):
        order = lambda p: [1 + (p + turn + n) % 3 for n in range(3)]
        plan = cluster.dir / "plan.json"
        wanted = [{"topic": "t", "partition": p, "replicas": order(p)} for p in range(PARTITIONS)]
        plan.write_text(json.dumps({"version": 1, "partitions": wanted}))
        run(*tool, "--reassignment-json-file", str(plan))
        admin.elect_leaders(ElectionType.PREFERRED, None).result(20)
        led = lambda: all(p.leader == order(p.id)[0] for p in cluster.partitions("t").values())
        cluster.wait("the preferred ones lead", led)
    assert load.finish() > 1_000
