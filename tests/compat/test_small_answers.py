"""Answers that few clients look at, as Kafka 4.4.0 gives them: commits without a group, authorized operations, requests that name
something twice, groups that rebalance."""

import struct
import time
import uuid

import pytest
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType
from test_bad_input import answer, connect, request, string

INVALID_REQUEST, INVALID_CONFIG, ILLEGAL_GENERATION, INVALID_GROUP_ID, UNKNOWN_MEMBER_ID = 42, 40, 22, 24, 25
LIST_OFFSETS, METADATA, OFFSET_COMMIT, OFFSET_FETCH, JOIN, SYNC, DESCRIBE, ALTER, ALTER_INCREMENTALLY = 2, 3, 8, 9, 11, 14, 15, 33, 44
CREATE_TOPICS, DELETE_TOPICS, CREATE_PARTITIONS, DELETE_GROUPS = 19, 20, 37, 42
NULL = struct.pack(">h", -1)


@pytest.fixture
def admin(broker):
    return AdminClient({"bootstrap.servers": broker.bootstrap})


@pytest.fixture
def topic(admin):
    topic = f"t-{uuid.uuid4()}"
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(10)
    return topic


def array(items):
    return struct.pack(">i", len(items)) + b"".join(items)


def text(value):
    return NULL if value is None else string(value.encode())


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 4

    def number(self, kind):
        [number] = struct.unpack_from(f">{kind}", self.data, self.at)
        self.at += struct.calcsize(f">{kind}")
        return number

    def text(self, kind="h"):
        length = self.number(kind)
        if length < 0:
            return None
        self.at += length
        return self.data[self.at - length:self.at]

    def list(self, element):
        return [element() for _ in range(self.number("i"))]


class Client:
    def __init__(self, broker):
        self.connection = connect(broker)

    def send(self, key, version, body):
        self.connection.sendall(request(key, version, body))

    def ask(self, key, version, body):
        self.send(key, version, body)
        return Reader(answer(self.connection))

    def commit(self, group, topic, offset, generation=-1, member="", instance=None):
        body = text(group) + struct.pack(">i", generation) + text(member) + text(instance)
        body += array([text(topic) + array([struct.pack(">iqi", 0, offset, -1) + text("")])])
        r = self.ask(OFFSET_COMMIT, 7, body)
        r.number("i")
        [(_, [(_, error)])] = r.list(lambda: (r.text(), r.list(lambda: (r.number("i"), r.number("h")))))
        return error

    def committed(self, group, topic):
        r = self.ask(OFFSET_FETCH, 5, text(group) + array([text(topic) + array([struct.pack(">i", 0)])]))
        r.number("i")
        part = lambda: (r.number("i"), r.number("q"), r.number("i"), r.text(), r.number("h"))
        [(_, [(_, offset, _, _, error)])] = r.list(lambda: (r.text(), r.list(part)))
        assert error == 0
        return offset

    def join(self, group, instance=None, version=5, member="", wait=True):
        # Version 3 knows no instance ids, and asks for no second request with the member id.
        body = text(group) + struct.pack(">ii", 20_000, 20_000) + text(member) + (text(instance) if version >= 5 else b"")
        self.send(JOIN, version, body + text("consumer") + array([text("range") + struct.pack(">i", 3) + b"sub"]))
        return self.joined(version) if wait else None

    def joined(self, version):
        r = Reader(answer(self.connection))
        _, error, generation, _, leader, me = (r.number("i"), r.number("h"), r.number("i"), r.text(), r.text(), r.text())
        members = r.list(lambda: (r.text(), r.text() if version >= 5 else None, r.text("i")))
        return error, generation, leader.decode(), me.decode(), len(members)

    def sync(self, group, generation, member, instance=None, assignment=None):
        given = [] if assignment is None else [text(member) + struct.pack(">i", len(assignment)) + assignment]
        body = text(group) + struct.pack(">i", generation) + text(member) + text(instance) + array(given)
        r = self.ask(SYNC, 3, body)
        r.number("i")
        return r.number("h"), r.text("i")

    def describe(self, group, operations=False):
        r = self.ask(DESCRIBE, 4, array([text(group)]) + bytes([operations]))
        r.number("i")
        member = lambda: {name: r.text(kind) for name, kind in [("id", "h"), ("instance", "h"), ("client", "h"), ("host", "h"),
                                                                ("subscription", "i"), ("assignment", "i")]}
        [found] = r.list(lambda: {"error": r.number("h"), "id": r.text(), "state": r.text(), "type": r.text(), "protocol": r.text(),
                                  "members": r.list(member), "operations": r.number("i")})
        return found

    def alter(self, topics, entries):
        body = array([b"\2" + text(t) + array([text(name) + text(value) for name, value in entries]) for t in topics])
        r = self.ask(ALTER, 1, body + b"\0")
        r.number("i")
        return r.list(lambda: (r.number("h"), r.text(), r.number("b"), r.text())[0])

    def alter_incrementally(self, topics, entries):
        entry = lambda name, operation, value: text(name) + bytes([operation]) + text(value)
        body = array([b"\2" + text(t) + array([entry(*e) for e in entries]) for t in topics])
        r = self.ask(ALTER_INCREMENTALLY, 0, body + b"\0")
        r.number("i")
        return r.list(lambda: (r.number("h"), r.text(), r.number("b"), r.text())[0])


def test_commits_without_a_group_or_without_a_generation(make_broker):
    broker = make_broker()
    admin = AdminClient({"bootstrap.servers": broker.bootstrap})
    admin.create_topics([NewTopic("t", 1, 1)])["t"].result(10)
    # Its coordinator is found and ready once this is answered.
    Consumer({"bootstrap.servers": broker.bootstrap, "group.id": "g"}).committed([TopicPartition("t", 0)], timeout=10)
    client = Client(broker)
    assert client.commit("", "t", 3) == 0
    assert client.commit("", "t", 4, member="somebody") == 0
    assert client.commit("", "t", 5, generation=1) == UNKNOWN_MEMBER_ID
    assert client.commit("g", "t", 5, generation=1) == ILLEGAL_GENERATION
    assert client.commit("g", "t", 6, member="somebody") == 0
    assert client.commit("g", "t", 7, instance="somebody") == 0
    assert client.commit("g", "t", 8, generation=0, member="somebody") == UNKNOWN_MEMBER_ID
    error, generation, _, me, _ = client.join("g", version=3)
    assert error == 0 and client.sync("g", generation, me, assignment=b"all") == (0, b"all")
    assert client.commit("g", "t", 9, member="somebody") == UNKNOWN_MEMBER_ID, "the group has members"
    assert client.join("", version=3)[0] == INVALID_GROUP_ID, "without an id nobody has members"
    broker.kill()
    broker.start()
    client = Client(broker)
    until = time.monotonic() + 10
    while client.commit("", "other", 1) in (14, 15, 16):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert (client.committed("", "t"), client.committed("g", "t")) == (4, 7)
    admin = AdminClient({"bootstrap.servers": broker.bootstrap})
    listed = admin.list_consumer_groups().result(10)
    assert {g.group_id for g in listed.valid} == {"", "g"}, listed.errors


def test_authorized_operations_are_told_to_whoever_asks(broker, admin, topic):
    name = lambda operations: {operation.name for operation in operations}
    of_topic = {"READ", "WRITE", "CREATE", "DELETE", "ALTER", "DESCRIBE", "DESCRIBE_CONFIGS", "ALTER_CONFIGS"}
    [described] = admin.describe_topics(TopicCollection([topic]), include_authorized_operations=True).values()
    assert name(described.result(10).authorized_operations) == of_topic
    cluster = admin.describe_cluster(include_authorized_operations=True).result(10)
    assert name(cluster.authorized_operations) == {
        "CREATE", "ALTER", "DESCRIBE", "CLUSTER_ACTION", "DESCRIBE_CONFIGS", "ALTER_CONFIGS", "IDEMPOTENT_WRITE"}
    group = f"g-{uuid.uuid4()}"
    offsets = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, 0, 1)])
    list(admin.alter_consumer_group_offsets([offsets]).values())[0].result(10)
    [described] = admin.describe_consumer_groups([group], include_authorized_operations=True).values()
    assert name(described.result(10).authorized_operations) >= {"READ", "DELETE", "DESCRIBE"}
    client = Client(broker)
    assert client.describe(group, operations=True)["operations"] == 3400
    assert client.describe(group)["operations"] == -2**31
    for asked, expected in [(b"\1\1", (3576, 8096)), (b"\0\0", (-2**31, -2**31))]:
        r = client.ask(METADATA, 8, array([text(topic)]) + b"\0" + asked)
        assert struct.unpack(">ii", r.data[-8:]) == expected


def test_a_partition_that_is_asked_for_twice_is_refused_once(broker, topic):
    client = Client(broker)
    asked = [struct.pack(">iiq", partition, -1, time) for partition, time in [(0, -1), (0, -2), (7, -1)]]
    for topics in ([text(topic) + array(asked)], [text(topic) + array([a]) for a in asked]):
        r = client.ask(LIST_OFFSETS, 5, struct.pack(">ib", -1, 0) + array(topics))
        r.number("i")
        part = lambda: (r.number("i"), r.number("h"), (r.number("q"), r.number("q"), r.number("i")))
        told = r.list(lambda: (r.text(), r.list(part)))
        told = [p for name, partitions in told for p in partitions]
        assert told == [(0, INVALID_REQUEST, (-1, -1, -1)), (7, 3, (-1, -1, -1))]


def test_topics_and_groups_that_are_named_twice_are_left_alone(broker, admin, topic):
    client = Client(broker)
    result = lambda r: (r.text(), r.number("h"))

    def first_list(key, version, body, skip, element):
        r = client.ask(key, version, body)
        if skip:
            r.number("i")
        return r.list(lambda: element(r))

    named = topic.encode()
    grown = first_list(CREATE_PARTITIONS, 0, array([text(topic) + struct.pack(">ii", n, -1) for n in (3, 4)]) + struct.pack(">ib", 5000, 0),
                       True, lambda r: (r.text(), r.number("h"), r.text()))
    assert [g[:2] for g in grown] == [(named, INVALID_REQUEST)]
    assert first_list(DELETE_TOPICS, 1, array([text(topic)] * 2) + struct.pack(">i", 5000), True, result) == [(named, INVALID_REQUEST)]
    new = text("named-twice") + struct.pack(">ihii", 1, 1, 0, 0)
    made = first_list(CREATE_TOPICS, 2, array([new, new]) + struct.pack(">ib", 5000, 0),
                      True, lambda r: (r.text(), r.number("h"), r.text()))
    assert [m[:2] for m in made] == [(b"named-twice", INVALID_REQUEST)]
    topics = admin.list_topics(timeout=10).topics
    assert "named-twice" not in topics and len(topics[topic].partitions) == 1
    group = f"g-{uuid.uuid4()}"
    offsets = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, 0, 1)])
    list(admin.alter_consumer_group_offsets([offsets]).values())[0].result(10)
    assert first_list(DELETE_GROUPS, 0, array([text(group)] * 2), True, result) == [(group.encode(), 0)]


def test_changes_of_settings_without_a_value_or_named_twice_are_refused(broker, topic):
    client = Client(broker)
    assert client.alter([topic], [("retention.ms", "5000")]) == [0]
    assert client.alter([topic], [("retention.ms", None)]) == [INVALID_REQUEST]
    assert client.alter([topic], [("retention.ms", "1"), ("retention.ms", "2")]) == [INVALID_REQUEST]
    assert client.alter([topic, topic], [("retention.ms", "1")]) == [INVALID_REQUEST] * 2
    sets, deletes = 0, 1
    assert client.alter_incrementally([topic], [("retention.ms", sets, None)]) == [INVALID_REQUEST]
    assert client.alter_incrementally([topic], [("retention.ms", sets, "1"), ("retention.ms", sets, "2")]) == [INVALID_REQUEST]
    assert client.alter_incrementally([topic, topic], [("retention.ms", sets, "1")]) == [INVALID_REQUEST] * 2
    assert client.alter_incrementally([topic], [("no.such", deletes, None), ("segment.ms", sets, "7000")]) == [0]
    assert client.alter_incrementally([topic], [("no.such", sets, "1")]) == [INVALID_CONFIG]
    admin = AdminClient({"bootstrap.servers": broker.bootstrap})
    [described] = admin.describe_configs([ConfigResource(ResourceType.TOPIC, topic)]).values()
    told = described.result(10)
    assert (told["retention.ms"].value, told["segment.ms"].value) == ("5000", "7000"), "what is refused changes nothing"


def test_a_group_that_rebalances_shows_what_its_members_had(broker, admin, topic):
    group = f"g-{uuid.uuid4()}"
    one, two = Client(broker), Client(broker)
    _, generation, _, me, _ = until_found(lambda: one.join(group, version=3))
    assert one.sync(group, generation, me, assignment=b"half") == (0, b"half")
    two.join(group, version=3, wait=False)
    until = time.monotonic() + 10
    while (found := one.describe(group))["state"] != b"PreparingRebalance":
        assert time.monotonic() < until, found
        time.sleep(0.02)
    had = {m["id"].decode(): (m["assignment"], m["subscription"]) for m in found["members"]}
    assert had[me] == (b"half", b"") and len(had) == 2 and found["protocol"] == b""
    one.join(group, version=3, member=me)
    assert two.joined(3)[0] == 0


def test_a_static_leader_that_comes_back_goes_on_as_before(broker, topic):
    group = f"g-{uuid.uuid4()}"
    client = Client(broker)
    _, generation, leader, old, members = until_found(lambda: client.join(group, "i"))
    assert (leader, members) == (old, 1)
    assert client.sync(group, generation, old, "i", b"mine") == (0, b"mine")
    error, again, leader, new, members = client.join(group, "i")
    # Versions before 9 cannot say that there is nothing to assign: it must not think that it leads.
    assert (error, again, leader, members) == (0, generation, old, 0) and new != old
    assert client.sync(group, generation, new, "i") == (0, b"mine")


def until_found(join):
    until = time.monotonic() + 10
    while (joined := join())[0] in (14, 15, 16):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert joined[0] == 0
    return joined
