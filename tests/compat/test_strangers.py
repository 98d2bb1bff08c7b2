"""What others on the network or on the machine can do to a broker."""

import os
import pathlib
import resource
import socket
import struct
import subprocess
import time

import pytest
from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient, NewTopic
from conftest import BINARY, clean_environment
from test_bad_input import answer, assert_serving, connect, frame, is_closed, request


def test_the_name_of_the_metadata_log_is_reserved(broker):
    admin = AdminClient({"bootstrap.servers": broker.bootstrap})
    created = admin.create_topics([NewTopic("__cluster_metadata", 1)])
    with pytest.raises(KafkaException) as refused:
        created["__cluster_metadata"].result(10)
    assert refused.value.args[0].name() == "TOPIC_EXCEPTION"


def test_connections_that_speak_no_kafka_do_not_fill_the_log(broker):
    before = len(broker.log_text().splitlines())
    for _ in range(300):
        with socket.create_connection(("127.0.0.1", broker.port)) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert connection.recv(1) == b"", "it is closed"
    lines = broker.log_text().splitlines()[before:]
    # One line in 5 s for each of the two shards.
    assert 1 <= len(lines) <= 6, lines


def test_other_users_cannot_read_what_is_stored(make_broker):
    broker = make_broker(preexec_fn=lambda: os.umask(0))
    producer = Producer({"bootstrap.servers": broker.bootstrap})
    producer.produce("t", b"private")
    assert producer.flush(20) == 0
    stored = list(pathlib.Path(broker.data_dir).rglob("*"))
    assert stored
    assert not [p for p in stored if p.stat().st_mode & 0o007]


def test_a_broker_whose_folder_was_removed_acknowledges_nothing_more(make_broker):
    broker = make_broker()
    aside = broker.data_dir + "-aside"
    try:
        os.rename(broker.data_dir, aside)
        assert broker.process.wait(10) == 1
        assert f"the data folder {broker.data_dir} was removed or replaced" in broker.log_text()
    finally:
        os.rename(aside, broker.data_dir)
    broker.start()


def test_a_development_ca_is_not_taken_from_a_folder_that_all_share(tmp_path):
    environment = {k: v for k, v in clean_environment().items() if k not in ("HOME", "XDG_STATE_HOME")}
    command = [BINARY, "serve", "--data-dir", tmp_path / "data", "--kafka-listen", "127.0.0.1:0"]
    command += ["--cluster-listen", "127.0.0.1:1", "--node-id", "1", "--peers", "1@127.0.0.1:1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "set HOME or XDG_STATE_HOME" in done.stderr


def test_whoever_takes_all_liveness_connections_breaks_no_link_between_nodes(make_cluster):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    cluster = make_cluster()
    first, second = cluster.nodes[0], cluster.nodes[1]
    second.kill()
    taken = []
    try:
        for _ in range(1_100):
            taken.append(socket.create_connection(("127.0.0.1", first.cluster_port)))
        second.launch().wait_ready()
        before = second.log_text().count("connected to a member of the metadata quorum")
        time.sleep(3)
        again = second.log_text().count("connected to a member of the metadata quorum") - before
        assert again <= 1, second.log_text()
    finally:
        for connection in taken:
            connection.close()


def text(value):
    return struct.pack(">h", len(value)) + value


LONG = b"x" * 32_760


@pytest.mark.parametrize("asked", [
    request(19, 2, struct.pack(">i", 1) + text(LONG) + struct.pack(">ihiiib", 1, 1, 0, 0, 1000, 0)),
    request(19, 4, struct.pack(">i", 1) + text(b"\x01" * 7000) + struct.pack(">ihiiib", 1, 1, 0, 0, 1000, 0)),
    request(19, 2, struct.pack(">i", 1) + text(b"t") + struct.pack(">ihii", 1, 1, 0, 1) + text(b"retention.ms") + text(LONG)
            + struct.pack(">ib", 1000, 0)),
    request(32, 1, struct.pack(">ib", 1, 2) + text(LONG) + struct.pack(">ib", -1, 0)),
    request(33, 0, struct.pack(">ib", 1, 4) + text(b"0") + struct.pack(">i", 1) + text(b"num.partitions") + text(LONG) + b"\1"),
    frame(struct.pack(">hhih", 11, 4, 7, 32_767) + b"c" * 32_767 + text(b"g") + struct.pack(">ii", 10_000, 10_000) + text(b"")
          + text(b"consumer") + struct.pack(">i", 1) + text(b"range") + struct.pack(">i", 1) + b"x"),
], ids=["name", "controls", "value", "describe", "alter", "client"])
def test_an_answer_that_quotes_what_was_asked_fits_its_encoding(broker, asked):
    with connect(broker) as connection:
        connection.sendall(asked)
        answer(connection)
    assert_serving(broker)
    assert "cannot be encoded" not in broker.log_text()


def test_a_string_that_only_the_compact_encoding_carries_is_refused(broker):
    # FindCoordinator 4 with a key of 32,768 bytes.
    key = b"\x81\x80\x02" + b"k" * 32_768
    with connect(broker) as connection:
        connection.sendall(request(10, 4, b"\0\0\2" + key + b"\0"))
        assert is_closed(connection)
    assert_serving(broker)
