"""Kafka Streams, which the pipeline is compared with: how it is built, and when a run of it is no result."""

from __future__ import annotations

import re
import stat
from collections import Counter
from pathlib import Path

import pytest

from orderstream.bench import kafka_streams
from orderstream.bench.kafka_streams import (
    AT_LEAST_ONCE,
    COMMIT_INTERVALS_MS,
    EVENTS,
    EXACTLY_ONCE,
    PROBE_ORDERS,
    SOURCES,
    TABLE,
    Guarantee,
    build,
    digest,
    jdbc_url,
    missing,
    units_needed,
    wrong_events,
    wrong_stock,
)
from orderstream.bench.measure import WARM_UP_ORDERS
from orderstream.engines.programs import Programs
from orderstream.errors import EngineMissing
from orderstream.settings import project_dir

MAVEN = """#!/bin/sh
for option; do
    case $option in
        -Dbuilt=*) mkdir -p "${option#*=}" && echo jar > "${option#*=}/peer.jar" ;;
        -DoutputDirectory=*) mkdir -p "${option#*=}" && echo jar > "${option#*=}/kafka-streams.jar" ;;
    esac
done
echo built >> "$0.log"
"""


def tools(folder: Path, **scripts: str) -> Programs:
    """Return programs that find these scripts, and no others."""
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(script)
        (folder / name).chmod(stat.S_IRWXU)
    return Programs(path=f"{folder}:/usr/bin-without-java")


JAVA = "#!/bin/sh\necho 'openjdk version \"17.0.1\"'\n"


@pytest.mark.parametrize(
    ("scripts", "packages"),
    [
        ({}, ["openjdk-17-jdk-headless", "maven"]),
        ({"java": JAVA, "mvn": MAVEN}, ["openjdk-17-jdk-headless"]),  # a runtime does not compile
        ({"java": JAVA, "javac": JAVA}, ["maven"]),
        ({"java": JAVA.replace("17", "11"), "javac": JAVA, "mvn": MAVEN}, ["openjdk-17-jdk-headless"]),
        ({"java": JAVA, "javac": JAVA, "mvn": MAVEN}, []),
    ],
)
def test_what_is_not_installed_is_named(scripts: dict[str, str], packages: list[str], tmp_path: Path) -> None:
    programs = tools(tmp_path / "bin", **scripts)
    assert missing(programs) == packages
    if packages:
        with pytest.raises(EngineMissing, match=f"apt-get install {' '.join(packages)}"):
            build(tmp_path / "peer", print, programs)


def test_the_peer_is_built_once_and_again_when_its_sources_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tools(tmp_path / "bin", java=JAVA, javac=JAVA, mvn=MAVEN)
    said: list[str] = []
    for _ in range(2):
        libs = build(tmp_path / "peer", said.append, programs)
        assert {file.name for file in libs.glob("*.jar")} == {"peer.jar", "kafka-streams.jar"}
    assert len(said) == 1
    monkeypatch.setattr(kafka_streams, "digest", lambda: "other sources")
    build(tmp_path / "peer", said.append, programs)
    assert len(said) == 2
    assert (tmp_path / "bin" / "mvn.log").read_text() == "built\nbuilt\n"


def test_a_build_that_fails_tells_what_maven_said(tmp_path: Path) -> None:
    programs = tools(tmp_path / "bin", java=JAVA, javac=JAVA, mvn="#!/bin/sh\necho no such artifact; exit 1\n")
    with pytest.raises(EngineMissing, match="no such artifact"):
        build(tmp_path / "peer", print, programs)
    assert not (tmp_path / "peer" / "libs").exists()


def test_a_changed_source_is_another_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_streams, "SOURCES", tmp_path)
    (tmp_path / "pom.xml").write_text("<project/>")
    (tmp_path / "src").mkdir()
    found = {digest()}
    for text in ("class A {}", "class A { }"):
        (tmp_path / "src" / "A.java").write_text(text)
        found.add(digest())
    (tmp_path / "README.md").write_text("not built")
    assert len(found) == 3
    assert digest() in found


def test_the_peer_has_the_brokers_version_of_kafka() -> None:
    def version(pom: Path, artifact: str) -> str:
        found = re.search(rf"<artifactId>{artifact}</artifactId>\s*<version>(.*?)</version>", pom.read_text())
        assert found, f"{pom} has no {artifact}"
        return found[1]

    broker = version(project_dir() / "deploy" / "kafka" / "pom.xml", r"kafka_2\.13")
    assert version(SOURCES / "pom.xml", "kafka-streams") == broker


def test_the_job_has_what_the_application_reads() -> None:
    source = Path(kafka_streams.__file__).read_text()
    record = (SOURCES / "src/main/java/orderstream/streams/Job.java").read_text()
    wanted = [re.sub("([A-Z])", r"_\1", name).lower() for name in re.findall(r"(?:String|int) (\w+)", record)]
    assert wanted
    assert [name for name in wanted if f'"{name}": ' not in source] == []


def test_the_rows_have_what_the_application_writes() -> None:
    written = re.search(
        r'" \((order_id.*?)\)"', (SOURCES / "src/main/java/orderstream/streams/Rows.java").read_text(), re.S
    )
    assert written
    columns = re.findall(r"\w+", written[1])
    assert len(columns) == 17
    assert TABLE in kafka_streams.ROWS
    assert [name for name in columns if not re.search(rf"\b{name}\b", kafka_streams.ROWS)] == []


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "postgresql://me@127.0.0.1:20001/db",
            "jdbc:postgresql://127.0.0.1:20001/db?user=me&reWriteBatchedInserts=true",
        ),
        (
            "postgresql://me:s%26p@host/db",
            "jdbc:postgresql://host:5432/db?user=me&reWriteBatchedInserts=true&password=s%26p",
        ),
    ],
)
def test_jdbc_gets_the_same_database(url: str, expected: str) -> None:
    assert jdbc_url(url) == expected


def test_stock_lasts_for_every_probe_and_warm_up() -> None:
    assert units_needed(10) == 10 + WARM_UP_ORDERS + len(COMMIT_INTERVALS_MS) * PROBE_ORDERS


@pytest.mark.parametrize("guarantee", [AT_LEAST_ONCE, EXACTLY_ONCE])
def test_lost_events_are_faults_and_repeats_are_where_none_may_be(guarantee: Guarantee) -> None:
    told = Counter((order_id, str(status)) for order_id in "ab" for status in EVENTS)
    assert wrong_events(told, "ab", guarantee) == []
    assert wrong_events(told, "abc", guarantee) == ["events: 4 lost"]
    assert wrong_events(told, "a", guarantee) == ["events: 4 of no order"]
    told["a", "PAID"] += 1
    assert wrong_events(told, "ab", guarantee) == (["events: 1 repeated"] if guarantee == EXACTLY_ONCE else [])


@pytest.mark.parametrize("guarantee", [AT_LEAST_ONCE, EXACTLY_ONCE])
def test_stock_that_does_not_add_up_is_a_fault(guarantee: Guarantee) -> None:
    def faults(on_hand: int, reserved: int, sold: int) -> int:
        counts = {"on_hand": on_hand, "reserved": reserved, "sold": sold}
        return len(wrong_stock(counts, received=100, sold=40, guarantee=guarantee))

    assert faults(60, 0, 40) == 0
    assert faults(60, 1, 40) == 1
    assert faults(61, 0, 40) == 1
    assert faults(61, 0, 39) == 1
    assert faults(59, 0, 41) == (1 if guarantee == EXACTLY_ONCE else 0)
