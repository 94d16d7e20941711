"""What upstream does where we rely on it beyond its documentation: a new version has to be read before it is taken.

Our drain loop replaces Faust's and counts offsets by chunk; our tables write Faust's changelogs themselves.  Both reach into
methods that are no public interface, all from one room: ``streams/upstream``.  Each is pinned here by a hash of its source;
when one fails, read its diff with what is said beside it, then put the new hash in.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import socket
import textwrap
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import aiokafka.client
import aiokafka.consumer.fetcher
import aiokafka.producer.message_accumulator
import aiokafka.protocol.fetch
import faust.app.base
import faust.app.router
import faust.assignor.partition_assignor
import faust.stores.memory
import faust.streams
import faust.tables.base
import faust.tables.recovery
import faust.transport.conductor
import faust.transport.consumer
import faust.transport.drivers.aiokafka
import faust.web.drivers.aiohttp
import pytest
import redis._parsers.hiredis
import redis.asyncio.connection

from orderstream.agents.app import WorkerApp, create_app
from orderstream.settings import Settings, load
from orderstream.streams.topics import TABLES, TOPICS, changelog_topic
from orderstream.streams.upstream.consumer import Consumer, Transport
from orderstream.tables.batched import BatchedTable

VERSIONS = {"faust-streaming": "0.15.3", "mode-streaming": "0.7.1", "aiokafka": "0.14.0"}

_consumer = faust.transport.consumer.Consumer
_delegate = faust.transport.consumer.ThreadDelegateConsumer
_driver = faust.transport.drivers.aiokafka
_memory = faust.stores.memory.Store
_collection = faust.tables.base.Collection
_recovery = faust.tables.recovery.Recovery
_app = faust.app.base.App
_assignor = faust.assignor.partition_assignor.PartitionAssignor

PINS: dict[str, tuple[Any, str, str]] = {
    # name: (the code, its hash, what to read again when it changes)
    "Consumer._drain_messages": (
        _consumer._drain_messages,
        "44a2500309e83c63",
        "streams/upstream/consumer.py replaces it: what it does for a message, when it reads flow_active, its faults",
    ),
    "Consumer.getmany": (
        _consumer.getmany,
        "4b168d84882a70d6",
        "_drain_messages does its checks of flow and active partitions itself",
    ),
    "Consumer._wait_next_records": (
        _consumer._wait_next_records,
        "6218e1969a636b3f",
        "_drain_messages calls it: it waits out a stopped flow and returns records with the active partitions",
    ),
    "Consumer._new_offset": (
        _consumer._new_offset,
        "1d2c7ea89a7ad4f1",
        "replaced: what it returns is committed; None: nothing",
    ),
    "Consumer._filter_tps_with_pending_acks": (
        _consumer._filter_tps_with_pending_acks,
        "f6f9239774234e7e",
        "replaced: which partitions a commit takes, asked for by topic, by partition or by None",
    ),
    "Consumer._filter_committable_offsets": (
        _consumer._filter_committable_offsets,
        "dc5e9baf5d994485",
        "calls _new_offset once a commit: a popped chunk is not returned again",
    ),
    "Consumer._should_commit": (
        _consumer._should_commit,
        "5ce941793947ad42",
        "an offset of 0 is never committed; so 0 means: never",
    ),
    "Consumer._commit_tps": (
        _consumer._commit_tps,
        "a20e230b05ae8b15",
        "the path from chunks to the commit; attachments stay empty",
    ),
    "Consumer._commit_offsets": (
        _consumer._commit_offsets,
        "1a69799041188441",
        "leaves out partitions that were revoked, notes what was committed in _committed_offset",
    ),
    "Consumer.perform_seek": (
        _consumer.perform_seek,
        "0e8c130ff4b0afd8",
        "extended: it sets _read_offset and _committed_offset",
    ),
    "Consumer.on_partitions_revoked": (
        _consumer.on_partitions_revoked,
        "d04b7ae72c6fc206",
        "extended: it drops offsets of revoked partitions, then calls the app's own",
    ),
    "Consumer.stop_flow": (_consumer.stop_flow, "cf7e875a2b0d40e8", "sets flow_active, which _drain_messages reads"),
    "Consumer.resume_flow": (
        _consumer.resume_flow,
        "db59630f25b5819b",
        "sets flow_active, which _drain_messages reads",
    ),
    "aiokafka Consumer._to_message": (
        _driver.Consumer._to_message,
        "7c24f6511b2fcef7",
        "_deliver makes such a message itself, for chunks; changelogs still go through it",
    ),
    "ThreadDelegateConsumer.seek_wait": (
        _delegate.seek_wait,
        "e9db5bbc4ceb2543",
        "perform_seek sends fresh partitions back with it",
    ),
    "ThreadDelegateConsumer.earliest_offsets": (
        _delegate.earliest_offsets,
        "2833b09d2888825b",
        "perform_seek asks it where to go",
    ),
    "Conductor._update_tp_index": (
        faust.transport.conductor.Conductor._update_tp_index,
        "e8e3ac9025ef44f7",
        "_deliver finds an agent's queue in _tp_index",
    ),
    "Recovery.on_recovery_completed": (
        _recovery.on_recovery_completed,
        "6ef567acf072e46d",
        "a rebalance ends with perform_seek, while the flow runs already: _sought keeps the drain loop from delivering",
    ),
    "Recovery._resume_streams": (
        _recovery._resume_streams,
        "d986a6710c1aca98",
        "the same, where there is nothing to recover",
    ),
    "App._on_partitions_revoked": (
        _app._on_partitions_revoked,
        "d5c895bbe57dc73a",
        "stops the flow and clears the agents' queues before the partitions go",
    ),
    "App._on_partitions_assigned": (
        _app._on_partitions_assigned,
        "de932b7927db85b3",
        "sets consumer_generation_id: chunks of older generations are dropped by it",
    ),
    "Stream.noack": (
        faust.streams.Stream.noack,
        "921a6f5c674d32d4",
        "agents/batches.py: nothing is acknowledged behind our back",
    ),
    "Collection.changelog_topic_name": (
        _collection.changelog_topic_name.fget,
        "9da6539a13a69aaf",
        "tables/batched.py writes there",
    ),
    "Collection._changelog_topic_name": (
        _collection._changelog_topic_name,
        "f341fe97037b4ac8",
        "streams/topics.py: changelog_topic says the same, so that init can create it",
    ),
    "Collection.apply_changelog_batch": (
        _collection.apply_changelog_batch,
        "b980a78d3ae9b1e8",
        "recovery reads what tables/batched.py wrote: JSON keys and values",
    ),
    "memory Store.__post_init__": (
        _memory.__post_init__,
        "e59c82f3785458b2",
        "streams/upstream/table.py gives data and _key_partition to tables/batched.py, which sets them",
    ),
    "memory Store.apply_changelog_batch": (
        _memory.apply_changelog_batch,
        "71863e3cd727aac2",
        "a None value deletes the key; values are never falsy otherwise",
    ),
    "memory Store._create_batch_iterator": (
        _memory._create_batch_iterator,
        "b082c8bcc0403823",
        "notes the partition of each key in _key_partition",
    ),
    "memory Store.on_recovery_completed": (
        _memory.on_recovery_completed,
        "a00bef343e139602",
        "drops keys of revoked partitions, by _key_partition: a key must be in there with its owner's partition",
    ),
    "App._on_rebalance_when_stopped": (
        _app._on_rebalance_when_stopped,
        "1b172d9af8ff4eb6",
        "replaced: it closes the consumer's client from the wrong thread",
    ),
    "AIOKafkaConsumerThread._create_consumer": (
        _driver.AIOKafkaConsumerThread._create_consumer,
        "a4dc6ba0681a298c",
        "extended: the consumer that it makes is not started yet, and keeps _fetch_max_wait_ms, _isolation_level, _client",
    ),
    "AIOKafkaConsumerThread._commit": (
        _driver.AIOKafkaConsumerThread._commit,
        "932852ce7a23f658",
        "ends with an IllegalStateError, takes a CommitFailedError that says 'already rebalanced' for a rebalance",
    ),
    "AIOKafkaConsumerThread.seek_to_committed": (
        _driver.AIOKafkaConsumerThread.seek_to_committed,
        "775ab0adc4b052ab",
        "replaced: one request for all partitions",
    ),
    "AIOKafkaConsumerThread.highwater": (
        _driver.AIOKafkaConsumerThread.highwater,
        "6f7dbe109ae6807f",
        "replaced: the last stable offset, and None in the middle of a rebalance",
    ),
    "AIOKafkaConsumerThread.verify_event_path": (
        _driver.AIOKafkaConsumerThread.verify_event_path,
        "b983e7735f647cb3",
        "replaced: it only logs what stands still, and fails in the middle of a rebalance",
    ),
    "Recovery._wait": (
        faust.tables.recovery.Recovery._wait,
        "ec7429b70176f8c6",
        "ends the recovery for good after broker_request_timeout: it is an hour",
    ),
    "AIOKafkaConsumer.seek_to_committed": (
        aiokafka.AIOKafkaConsumer.seek_to_committed,
        "f6cd85c8b70a4ccf",
        "done in one request by ConsumerThread._seek_to_committed: _coordinator.fetch_committed_offsets",
    ),
    "AIOKafkaClient.send": (
        aiokafka.client.AIOKafkaClient.send,
        "246b277687d7b687",
        "closes a connection without an answer within _request_timeout_ms, which new connections are given",
    ),
    "PartitionRecords._unpack_records": (
        aiokafka.consumer.fetcher.PartitionRecords._unpack_records,
        "b803e6d46480732c",
        "leaves out what was aborted, and passes over marks: next_fetch_offset, which becomes the position, is behind them",
    ),
    "AIOKafkaClient._metadata_update": (
        aiokafka.client.AIOKafkaClient._metadata_update,
        "06dc51ed3e0d38b8",
        "streams/upstream/pacing.py wraps it: False is a failed try",
    ),
    "FetchRequest.build": (
        aiokafka.protocol.fetch.FetchRequest.build,
        "952ef0f41192efc3",
        "streams/upstream/sessions.py builds from _topics and sets what names the session",
    ),
    "BatchBuilder.append": (
        aiokafka.producer.message_accumulator.BatchBuilder.append,
        "657d76f55157d9ca",
        "streams/upstream/filling.py does the same for many records: _builder, _relative_offset",
    ),
    "Fetcher._proc_fetch_request": (
        aiokafka.consumer.fetcher.Fetcher._proc_fetch_request,
        "59bf948fff47eed5",
        "a partition that the answer does not name stays as it is; it passes over the answer's own error",
    ),
    "AIOKafkaConsumerThread._verify_aiokafka_event_path": (
        _driver.AIOKafkaConsumerThread._verify_aiokafka_event_path,
        "c7c75a7c73289962",
        "replaced: it looks at when a partition was answered about last",
    ),
    "AIOKafkaConsumerThread.assignment": (
        _driver.AIOKafkaConsumerThread.assignment,
        "61f105132ae619f6",
        "extended: the same assignment is the same set",
    ),
    "Router._get_table_topic": (
        faust.app.router.Router._get_table_topic,
        "9b8b82613f2fb18a",
        "streams/upstream/web.py finds a table's partitions under it",
    ),
    "Router._urlident": (
        faust.app.router.Router._urlident,
        "3940b61e2b99eb70",
        "compares this worker's URL with another's",
    ),
    "PartitionAssignor.changelog_distribution": (
        _assignor.changelog_distribution.fset,
        "c13e0132bb9a84ea",
        "streams/upstream/web.py reads _tps_url",
    ),
    "PartitionAssignor.external_topic_distribution": (
        _assignor.external_topic_distribution.fset,
        "7e0b3d6a0aa2ead0",
        "streams/upstream/web.py reads _external_tps_url",
    ),
    "Fetcher._get_actions_per_node": (
        aiokafka.consumer.fetcher.Fetcher._get_actions_per_node,
        "1dab2cf937d165d0",
        "streams/upstream/fetch_list.py replaces it where nothing is unusual",
    ),
    "_AsyncHiredisParser.read_response": (
        redis._parsers.hiredis._AsyncHiredisParser.read_response,
        "6cba18b62d2aad4d",
        "orderstream/access.py reads answers from it, errors among them",
    ),
    "AbstractConnection.read_response": (
        redis.asyncio.connection.AbstractConnection.read_response,
        "c1b374bc1a30d0b4",
        "orderstream/access.py does what it does about timeouts and lost connections, for all answers together",
    ),
    "Web._new_transport_tcp": (
        faust.web.drivers.aiohttp.Web._new_transport_tcp,
        "3f9463d869f309ec",
        "streams/upstream/web.py hands it a socket that is bound already",
    ),
}


def code_hash(code: Any) -> str:
    """Return a hash of a function's source, the same under every Python."""
    return hashlib.sha256(inspect.getsource(inspect.unwrap(code)).encode()).hexdigest()[:16]


@pytest.mark.parametrize("package", VERSIONS)
def test_the_version_is_the_one_that_was_read(package: str) -> None:
    assert version(package) == VERSIONS[package], (
        f"{package} is another version: run this file, read the diff of whatever else fails, then pin the new version here "
        "and in pyproject.toml"
    )


@pytest.mark.parametrize("name", PINS)
def test_the_code_that_we_rely_on_is_the_one_that_was_read(name: str) -> None:
    code, expected, relied_on = PINS[name]
    found = code_hash(code)
    assert found == expected, (
        f"{name} has changed upstream.  We rely on it: {relied_on}.  Read its diff against the version "
        f"that is locked, fix our side where needed, then pin {found!r} here."
    )


def test_our_consumer_replaces_methods_that_are_still_there() -> None:
    ours = {name for name in vars(Consumer) if callable(getattr(Consumer, name)) and not name.startswith("__")}
    new = {
        "_behind",
        "_chunks_of",
        "_deliver",
        "_deliver_changelog",
        "_deliver_chunks",
        "_deliver_passed_over",
        "_is_wanted",
        "held_back",
        "_sought",
        "ack_chunk",
        "committed_offset",
        "done_offset",
        "lag",
        "read_again",
        "begin_at",
        "is_current",
        "read_offset",
    }
    assert ours == new | {
        "_new_consumer_thread",
        "_drain_messages",
        "_getmany",
        "_filter_tps_with_pending_acks",
        "_new_offset",
        "perform_seek",
        "on_partitions_revoked",
    }
    for name in ours - new:
        upstream = inspect.signature(getattr(_driver.Consumer, name)).parameters
        assert list(inspect.signature(getattr(Consumer, name)).parameters) == list(upstream), name
    assert not any(hasattr(_driver.Consumer, name) for name in new), "upstream has a method of that name now"


# The room

ROOT = Path(__file__).resolve().parents[2]
ROOM = "orderstream.streams.upstream."
LIBRARIES = ("faust", "mode", "aiokafka")
NAMED_TUPLES = {"_asdict", "_fields", "_replace"}
"""Private by their names only: documented methods of named tuples."""

OTHERS = {
    ("orderstream/exits.py", "_exit"),  # os._exit, which is documented
    ("agents/app.py", "_exit"),
    ("agents/watchdog.py", "_exit"),
    ("http/protocol.py", "_kwargs"),  # aiohttp's, held in tests/unit/test_security.py
    ("http/protocol.py", "_loop"),
    ("orderstream/metrics.py", "_labelnames"),  # prometheus_client's
    ("orderstream/access.py", "_parser"),  # redis-py's, pinned above
}
"""What files outside the room take of other libraries' private parts."""


def files() -> dict[str, Path]:
    """Return the files of the package outside the room, by the names of their modules."""
    found = {}
    for folder in ("orderstream", "agents", "bench", "http", "jobs", "lua", "sql", "streams", "tables"):
        for file in sorted((ROOT / folder).glob("**/*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            module = ".".join(parts if parts[0] == "orderstream" else ("orderstream", *parts))
            if not module.startswith(ROOM) and not (parts[0] == "orderstream" and (ROOT / parts[1]).is_dir()):
                found[module] = file
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def taken(tree: ast.AST) -> Iterator[str]:
    """Yield the private names that a file takes from something other than itself: of another object, or by an import."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            of = ast.unparse(node.value)
            if of not in ("self", "cls") and not (of == "super()" and node.attr in own):
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
            yield from (alias.name for alias in node.names if is_private(alias.name))
            yield from filter(is_private, (node.module or "").split("."))


def used(kind: type) -> set[str]:
    """Return the private names of its own that a class uses or defines."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    of_itself = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    read = {node.attr for node in of_itself if ast.unparse(node.value) in ("self", "cls", "super()")}
    return {name for name in read | set(vars(kind)) if is_private(name) and name != "_abc_impl"}


def is_theirs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in LIBRARIES


def reached_into(kind: type) -> set[str]:
    """Return the private names that a class of ours shares with the classes of a library that it derives from."""
    return used(kind) & {name for base in kind.__mro__ if is_theirs(base) for name in used(base)}


def test_no_other_file_takes_a_private_name_of_a_library() -> None:
    found = {
        (str(file.relative_to(ROOT)), name) for file in files().values() for name in taken(ast.parse(file.read_bytes()))
    }
    assert {one for one in found if one[1] not in NAMED_TUPLES} <= OTHERS


def test_no_class_of_another_file_reaches_into_the_libraries_that_it_derives_from() -> None:
    derived = {}
    for module, file in files().items():
        if any(name in file.read_text() for name in (*LIBRARIES, ROOM, "BatchedTable")):
            for kind in vars(importlib.import_module(module)).values():
                if inspect.isclass(kind) and kind.__module__ == module and any(map(is_theirs, kind.__mro__)):
                    derived[kind.__qualname__] = reached_into(kind)
    assert {"WorkerApp", "BatchedTable", "OwnerRouter"} <= set(derived)
    assert not any(derived.values()), derived


def test_a_reach_into_a_library_would_be_noticed() -> None:
    class Reaching(WorkerApp):
        def _new_web(self) -> Any:
            return self._consumer

    assert reached_into(Reaching) == {"_new_web", "_consumer"}
    text = "from faust.app import _x\ndef f(self, c): return c._read_offset, self._y, super()._z"
    assert sorted(taken(ast.parse(text))) == ["_read_offset", "_x", "_z"]


# The app that is made of it


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at the first word to anybody."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("nothing may connect while the app is made")

    for name in ("connect", "connect_ex", "bind", "listen", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load(_env_file=None, local_dir=tmp_path, topic_prefix="shop.", app_id="shop", partitions=3)


@pytest.fixture
def app(offline: None, settings: Settings) -> WorkerApp:
    return create_app(settings)


def test_the_agents_are_these_and_read_these_topics_raw(app: WorkerApp) -> None:
    reads = {name: set(agent.channel.topics) for name, agent in app.agents.items()}
    assert reads == {
        "reserve": {"shop.orders"},
        "pay": {"shop.order-commands", "shop.reservations"},
        "commit": {"shop.order-lines", "shop.stock-commands"},
    }
    for name, agent in app.agents.items():
        assert agent.concurrency == 1, f"{name}: more would commit past unfinished work"
        assert (agent.channel.key_serializer, agent.channel.value_serializer) == ("raw", "raw"), name


def test_every_topic_is_read_by_one_agent_or_by_the_outside(app: WorkerApp) -> None:
    read = [topic for agent in app.agents.values() for topic in agent.channel.topics]
    assert len(read) == len(set(read))
    assert {f"shop.{spec.name}" for spec in TOPICS} - set(read) == {"shop.order-events", "shop.dead-letters"}


def test_the_tables_are_these_and_their_changelogs_those_that_init_creates(app: WorkerApp) -> None:
    tables: dict[str, BatchedTable] = dict(app.tables)
    assert set(tables) == set(TABLES)
    for name, table in tables.items():
        assert table.changelog_topic_name == changelog_topic("shop", name)
        assert table.partitions == table.changelog_topic.partitions == 3, "partitioned like the topics of its keys"
        assert table.changelog_topic.compacting
        assert isinstance(table, BatchedTable)


def test_the_app_reads_through_our_transport_and_connects_only_when_it_starts(app: WorkerApp) -> None:
    assert isinstance(app.transport, Transport)
    with pytest.raises(RuntimeError, match="when the app starts"):
        _ = app.stage.store.pool.fetch


def test_an_app_is_made_as_often_as_one_likes(offline: None, settings: Settings) -> None:
    assert create_app(settings) is not create_app(settings)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("broker_commit_interval", 0.5),
        ("broker_session_timeout", 6.0),
        ("broker_heartbeat_interval", 1.5),
        ("consumer_auto_offset_reset", "none"),
        ("stream_wait_empty", False),
        ("topic_disable_leader", True),
        ("processing_guarantee", "at_least_once"),
        ("web_bind", "127.0.0.1"),
    ],
)
def test_the_app_is_configured_as_the_design_says(app: WorkerApp, name: str, expected: Any) -> None:
    found = getattr(app.conf, name)
    assert getattr(found, "value", found) == expected
