"""docker-compose.yml is valid, and speaks of settings and commands that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from orderstream.settings import PREFIX, Settings, load
from orderstream.streams.tracing import wanted

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
SCHEMA = ROOT / "tests" / "data" / "compose-spec.json"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content = yaml.safe_load(COMPOSE.read_text())
    assert isinstance(content, dict)
    return content


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose["services"]
    return found


def has_compose() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0


def test_it_fits_the_compose_specification(compose: dict[str, Any]) -> None:
    if has_compose():
        result = subprocess.run(
            ["docker", "compose", "-f", str(COMPOSE), "config", "-q"], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(compose)


def test_the_schema_bites(compose: dict[str, Any]) -> None:
    broken = {**compose, "services": {"kafka": {"imagine": "apache/kafka"}}}
    with pytest.raises(jsonschema.ValidationError, match="imagine"):
        jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(broken)


def test_every_variable_is_a_setting_with_a_value_that_it_takes(services: dict[str, dict[str, Any]]) -> None:
    ours = {name: service["environment"] for name, service in services.items() if "build" in service}
    assert set(ours) == {"init", "worker", "ingress"}
    for environment in ours.values():
        values = {key: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) for key, value in environment.items()}
        assert all(variable.startswith((PREFIX, "OTEL_")) for variable in values)
        chosen = {
            variable.removeprefix(PREFIX).lower(): value
            for variable, value in values.items()
            if variable.startswith(PREFIX)
        }
        assert set(chosen) <= set(Settings.model_fields)
        load(**{"_env_file": None, **chosen})
    # Comments may name settings too.
    for variable in re.findall(rf"{PREFIX}(\w+)", COMPOSE.read_text()):
        assert variable.lower() in Settings.model_fields


def test_every_command_exists(services: dict[str, dict[str, Any]]) -> None:
    from orderstream.jobs.cli.main import app

    group = typer.main.get_command(app)
    commands = set(getattr(group, "commands", {}))
    for service in services.values():
        if "build" in service:
            assert service["command"][0] in commands


def test_images_are_pinned_and_ports_stay_on_this_machine(services: dict[str, dict[str, Any]]) -> None:
    base = re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for image in [*base, *(service["image"] for service in services.values())]:
        assert re.search(r":v?\d+\.\d+(\.\d+)?(-|$)", image), f"{image} has no exact version"
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_every_service_is_watched_and_waits_for_what_it_needs(services: dict[str, dict[str, Any]]) -> None:
    assert set(services) == {
        "kafka", "redis", "postgres", "init", "worker", "ingress", "prometheus", "grafana", "jaeger",
    }  # fmt: skip
    for name, service in services.items():
        assert service["restart"]
        assert "healthcheck" in service or name == "init"
    assert services["worker"]["deploy"]["replicas"] == 3
    first, last = services["worker"]["ports"][0].split(":")[1].split("-")
    assert int(last) - int(first) + 1 == services["worker"]["deploy"]["replicas"]
    assert {name: need["condition"] for name, need in services["init"]["depends_on"].items()} == dict.fromkeys(
        ("kafka", "redis", "postgres"), "service_healthy"
    )
    for name in ("worker", "ingress"):
        assert services[name]["depends_on"] == {"init": {"condition": "service_completed_successfully"}}


def test_the_image_holds_the_package_and_every_folder_that_it_links_to() -> None:
    copied = set(re.findall(r"^COPY (\w+) \1$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    linked = {entry.name for entry in (ROOT / "orderstream").iterdir() if entry.is_symlink()}
    assert copied == {"orderstream", *linked}
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied <= let_in


def test_traces_go_where_a_service_takes_them(services: dict[str, dict[str, Any]]) -> None:
    for name in ("worker", "ingress"):
        environment = services[name]["environment"]
        assert wanted(environment)
        assert environment["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://jaeger:4318"
    assert not wanted({})


def test_every_folder_that_is_mounted_exists(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (ROOT / source).is_dir() if source.startswith("./") else source in compose["volumes"]
