"""Who writes where: the list of topics says it, the stages' source is held to it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orderstream.settings import Settings
from orderstream.streams import topics
from orderstream.streams.dead_letters import DeadLetter
from orderstream.streams.partitions import order_partition, partition_of, product_partition
from orderstream.streams.producer import Outbox
from orderstream.streams.topics import TABLES, TOPICS, TopicSpec, changelog_topic

ROOT = Path(__file__).resolve().parents[2]
AGENTS = ROOT / "agents"
STAGES = {"reserve": ("reserve",), "pay": ("pay",), "commit": ("commit", "stock"), "timers": ("timers",)}
"""The modules of each."""
SPECS: dict[str, TopicSpec] = {name: spec for name, spec in vars(topics).items() if isinstance(spec, TopicSpec)}


def outbox_methods() -> dict[str, str]:
    """Return the topic that each public method of the outbox writes to, from its source."""
    tree = ast.parse((ROOT / "streams" / "producer.py").read_text())
    (outbox,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Outbox")
    found: dict[str, str] = {}
    for method in outbox.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
            named = {node.id for node in ast.walk(method) if isinstance(node, ast.Name) and node.id in SPECS}
            assert len(named) <= 1, f"{method.name} writes to several topics: {named}"
            for name in named:
                found[method.name] = SPECS[name].name
    return found


METHODS = outbox_methods()


def functions(tree: ast.Module) -> dict[str, ast.AST]:
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def is_outbox(node: ast.expr) -> bool:
    return (isinstance(node, ast.Name) and node.id == "outbox") or (
        isinstance(node, ast.Attribute) and node.attr == "outbox"
    )


def named(function: ast.AST) -> set[str]:
    """Return the topics that a function names, as in ``settings.topic(ORDERS.name)``; none, if it reads records."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    if any(call.func.attr == "records" for call in calls if isinstance(call.func, ast.Attribute)):
        return set()
    asked = {ast.unparse(call.args[0]) for call in calls if ast.unparse(call.func).endswith("settings.topic")}
    return {SPECS[name.removesuffix(".name")].name for name in asked}


def writes(tree: ast.AST, borrowed: dict[str, ast.AST]) -> set[str]:
    """Return the topics that a piece of source writes to, itself or through functions borrowed from other stages."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found |= named(node)
        if isinstance(node, ast.Attribute) and is_outbox(node.value) and node.attr in METHODS:
            found.add(METHODS[node.attr])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in borrowed:
            rest = {name: function for name, function in borrowed.items() if name != node.func.id}
            found |= writes(borrowed[node.func.id], rest)
    return found


def borrowed_functions(tree: ast.Module) -> dict[str, ast.AST]:
    """Return the functions that a stage imports from other agent modules, with all that those are made of."""
    found: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("orderstream.agents."):
            other = ast.parse((AGENTS / f"{(node.module or '').rpartition('.')[2]}.py").read_text())
            theirs = functions(other)
            if {alias.name for alias in node.names} & set(theirs):
                found |= theirs
    return found


def stage_writes(stage: str) -> set[str]:
    return {topic for module in STAGES[stage] for topic in module_writes(module)}


def module_writes(module: str) -> set[str]:
    tree = ast.parse((AGENTS / f"{module}.py").read_text())
    imported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    borrowed = borrowed_functions(tree)
    calls = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported
    }
    found = writes(tree, {})
    for name in calls & set(borrowed):
        found |= writes(borrowed[name], borrowed)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_writes_to_the_topics_that_name_it_and_to_no_other(stage: str) -> None:
    assert stage_writes(stage) == {spec.name for spec in TOPICS if stage in spec.writers}


def test_a_write_to_a_foreign_topic_would_be_noticed() -> None:
    direct = ast.parse("def f(outbox):\n    outbox.stock_command(1, 2)")
    plain = ast.parse("def f(stage):\n    step[stage.settings.topic(RESERVATIONS.name), 1] = [2]")
    reading = ast.parse("def f(stage, batch):\n    batch.records(stage.settings.topic(RESERVATIONS.name))")
    by_self = ast.parse("class A:\n    def f(self):\n        self.outbox.order('1', b'', ())")
    helped = ast.parse("def g(outbox):\n    reject(1, 2, outbox)")
    reject = functions(ast.parse("def reject(a, b, outbox):\n    put(a)\n\ndef put(a):\n    outbox.dead_letter(a)"))
    assert writes(direct, {}) == {"stock-commands"}
    assert writes(plain, {}) == {"reservations"}
    assert writes(reading, {}) == set()
    assert writes(by_self, {}) == {"orders"}
    assert writes(helped, reject) == {"dead-letters"}


def test_every_topic_but_those_between_stages_has_a_method_of_the_outbox() -> None:
    assert sorted(METHODS.values()) == sorted(spec.name for spec in TOPICS if not spec.inner)


def sends(tree: ast.AST) -> Iterator[ast.Call]:
    """Yield calls of a producer's ``send``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("send"):
            receiver = node.func.value
            name = receiver.attr if isinstance(receiver, ast.Attribute) else getattr(receiver, "id", "")
            if "producer" in name:
                yield node


@pytest.mark.parametrize("module", sorted(file.stem for file in AGENTS.glob("*.py")))
def test_only_stages_and_the_views_changelogs_are_produced(module: str) -> None:
    text = (AGENTS / f"{module}.py").read_text()
    assert not list(sends(ast.parse(text))) or module in ("commit", "setback", "timers", "stage", "views")
    stages = {one for modules in STAGES.values() for one in modules}
    assert "outbox" not in text or module in (*stages, "app", "stage", "intake")


def test_no_topic_is_sent_to_by_faust_behind_the_outbox() -> None:
    calls = [
        f"{file.name}:{node.lineno}"
        for file in AGENTS.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in {"send_soon", "cast", "ask", "forward", "through", "group_by"}
        if ast.unparse(node.value) not in ("self", "pay")  # of ours
    ]
    assert calls == []


# The list itself


def test_topics_are_keyed_as_the_design_says() -> None:
    assert {spec.name: spec.keyed_by for spec in TOPICS} == {
        "orders": "product",
        "order-lines": "product",
        "reservations": "home",
        "order-commands": "order",
        "stock-commands": "product",
        "order-events": "home",
        "dead-letters": "source",
    }
    assert set(TOPICS) == set(SPECS.values())


def test_strangers_write_only_where_the_records_are_checked() -> None:
    strange = {spec.name for spec in TOPICS if {"outside", "ingress", "cli"} & set(spec.writers)}
    assert strange == {"orders", "order-commands", "stock-commands"}
    assert {spec.name for spec in TOPICS if spec.inner} == {"order-lines", "reservations"}
    assert not any(spec.inner for spec in TOPICS if spec.name in strange)


def test_changelogs_are_named_as_faust_names_them() -> None:
    assert [changelog_topic("shop", table) for table in TABLES] == [
        "shop-open-orders-changelog",
        "shop-stock-changelog",
    ]


# Where the outbox puts a record

SETTINGS = Settings(_env_file=None, topic_prefix="p.", partitions=7)
ORDER_ID, PRODUCT_ID, HOME = "5e6e7e1c-2f52-4d2b-9a55-5d0e5a0c9a11", "85123A", 4


def put(method: str) -> dict[tuple[str, int], Any]:
    outbox = Outbox(SETTINGS)
    arguments: dict[str, tuple[Any, ...]] = {
        "event": (ORDER_ID, HOME, b"v"),
        "dead_letter": (DeadLetter(b"k", b"v", ()),),
        "order": (PRODUCT_ID, b"v", ()),
        "order_command": (ORDER_ID, b"v"),
        "stock_command": (PRODUCT_ID, b"v"),
    }
    getattr(outbox, method)(*arguments[method])
    return {**outbox.publications(), **outbox.handovers()}


@pytest.mark.parametrize("method", METHODS)
def test_a_record_goes_to_its_topic_and_to_the_partition_of_its_keys_owner(method: str) -> None:
    (spec,) = (spec for spec in TOPICS if spec.name == METHODS[method])
    owner = {
        "product": product_partition(PRODUCT_ID, 7),
        "order": order_partition(ORDER_ID, 7),
        "home": HOME,
        "source": partition_of(b"k", 7),
    }[spec.keyed_by]
    ((where, records),) = put(method).items()
    assert where == (f"p.{spec.name}", owner)
    ((key, _, _),) = records
    assert key == {"product": PRODUCT_ID, "source": "k"}.get(spec.keyed_by, ORDER_ID).encode()


def test_a_command_goes_to_its_orders_home_where_that_is_known() -> None:
    assert order_partition(ORDER_ID, 7) != HOME
    outbox = Outbox(SETTINGS)
    outbox.order_command(ORDER_ID, b"v", HOME)
    assert set(outbox.handovers()) == {("p.order-commands", HOME)}


def test_events_and_dead_letters_are_told_before_anything_is_handed_on() -> None:
    outbox = Outbox(SETTINGS)
    outbox.event(ORDER_ID, HOME, b"e")
    outbox.dead_letter(DeadLetter(b"k", b"v", ()))
    outbox.order_command(ORDER_ID, b"c")
    outbox.order(PRODUCT_ID, b"o", ())
    assert {topic for topic, _ in outbox.publications()} == {"p.order-events", "p.dead-letters"}
    assert {topic for topic, _ in outbox.handovers()} == {"p.order-commands", "p.orders"}


def test_records_of_a_partition_keep_their_order() -> None:
    outbox = Outbox(SETTINGS)
    for n in range(50):
        outbox.event(ORDER_ID, HOME, b"%d" % n)
    ((_, records),) = outbox.publications().items()
    assert [value for _, value, _ in records] == [b"%d" % n for n in range(50)]
