"""Settings: checked at the start, all faults listed at once, no secret shown, one clear order of precedence."""

from __future__ import annotations

import errno
import json
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderstream.errors import OrderstreamError, SettingsError
from orderstream.settings import (
    ENGINES_FILE,
    ORDER_UNITS_MAX,
    PREFIX,
    Settings,
    load,
    local_engines,
    writable,
)
from orderstream.streams.commands import PRICE_CENTS_MAX


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder without a .env file."""
    monkeypatch.chdir(tmp_path)


def engines(folder: Path, **addresses: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / ENGINES_FILE).write_text(json.dumps(addresses))
    return folder


def faults(**overrides: Any) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(**overrides)
    return caught.value.faults


# Who wins


def test_the_order_is_override_environment_dotenv_engines_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tmp_path / "local"
    assert load(local_dir=local).kafka == "127.0.0.1:9092"
    engines(local, kafka="engines:1")
    assert load(local_dir=local).kafka == "engines:1"
    (tmp_path / ".env").write_text(f"{PREFIX}KAFKA=dotenv:1\n")
    assert load(local_dir=local).kafka == "dotenv:1"
    monkeypatch.setenv(f"{PREFIX}KAFKA", "environment:1")
    assert load(local_dir=local).kafka == "environment:1"
    assert load(local_dir=local, kafka="override:1").kafka == "override:1"


def test_the_engines_fill_in_only_what_nobody_else_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = engines(
        tmp_path / "local", kafka="engines:1", redis_url="redis://engines:2/0", database_url="postgres://engines/x"
    )
    monkeypatch.setenv(f"{PREFIX}REDIS_URL", "redis://environment:3/0")
    settings = load(local_dir=local, database_url="postgres://override/y", partitions=3)
    assert (settings.kafka, settings.redis_url) == ("engines:1", "redis://environment:3/0")
    assert (settings.database_url, settings.partitions) == ("postgres://override/y", 3)


def test_a_setting_that_repeats_the_default_wins_over_the_engines_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = engines(tmp_path / "local", kafka="engines:1")
    monkeypatch.setenv(f"{PREFIX}KAFKA", "127.0.0.1:9092")
    assert load(local_dir=local).kafka == "127.0.0.1:9092"


def test_the_engines_folder_itself_is_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}LOCAL_DIR", str(engines(tmp_path / "other", kafka="other:1")))
    assert load().kafka == "other:1"


def test_the_engines_file_says_nothing_but_addresses(tmp_path: Path) -> None:
    local = engines(tmp_path / "local", kafka="engines:1", payment_token="x", partitions="3")
    assert local_engines(local) == {"kafka": "engines:1"}
    assert load(local_dir=local).partitions == Settings(_env_file=None).partitions


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00"])
def test_an_engines_file_that_can_not_be_read_is_named(tmp_path: Path, content: str) -> None:
    file = engines(tmp_path / "local") / ENGINES_FILE
    file.write_text(content)
    (fault,) = faults(local_dir=file.parent)
    assert str(file) in fault
    assert "orderstream up" in fault


def test_an_engines_file_in_a_folder_that_can_not_be_entered_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refused)  # root may enter everything
    with pytest.raises(SettingsError, match=f"{PREFIX}LOCAL_DIR: .*{ENGINES_FILE} can't be read: Permission denied"):
        local_engines(tmp_path)


@pytest.mark.parametrize("why", ["Not a directory", "Permission denied"])
def test_a_folder_that_can_not_be_written_to_is_named_with_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    folder = tmp_path / "new" / "local"
    assert writable(folder) == folder
    if why == "Permission denied":
        monkeypatch.setattr("os.access", lambda *_: False)  # as it is for all but root
    else:
        (tmp_path / "file").touch()
        folder = tmp_path / "file" / "local"
    with pytest.raises(OrderstreamError, match=f"{folder} can't be written to: {why}\nset {PREFIX}LOCAL_DIR"):
        writable(folder)


# Bounds


def test_the_total_of_an_order_can_be_told_at_every_price() -> None:
    assert ORDER_UNITS_MAX * PRICE_CENTS_MAX < 2**63
    for lines, units in ((9, 1_000_000), (900, 10_000), (ORDER_UNITS_MAX, 1)):
        assert load(order_lines_max=lines, line_quantity_max=units, _env_file=None)
        with pytest.raises(SettingsError, match="order_lines_max"):
            load(order_lines_max=lines + 1, line_quantity_max=units, _env_file=None)


# All faults at once


def test_every_faulty_setting_is_named_at_once_with_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}PARTITIONS", "0")
    monkeypatch.setenv(f"{PREFIX}HOLD_TTL_S", "soon")
    found = faults(kafka="nowhere", log_level="loud", _env_file=None)
    assert sorted(fault.split(":")[0] for fault in found) == [
        f"{PREFIX}{name}" for name in ("HOLD_TTL_S", "KAFKA", "LOG_LEVEL", "PARTITIONS")
    ]
    assert sorted(fault.rpartition("(got ")[2] for fault in found) == ["'0')", "'loud')", "'nowhere')", "'soon')"]


def test_the_error_is_one_text_with_a_line_for_each_fault() -> None:
    with pytest.raises(SettingsError) as caught:
        load(partitions=0, http_port=70_000)
    assert str(caught.value).splitlines()[0] == "these settings can't be used:"
    assert len(str(caught.value).splitlines()) == 3


FAULTY: list[tuple[str, Any]] = [
    *(
        ("kafka", value)
        for value in ("", "host", "host:", ":9092", "host:0", "host:65536", "host:x", "a:1,,b:2", "a:1,b")
    ),
    *(("kafka", value) for value in ("a b:1", "kafka://a:1", "a:1/x", "a:१")),
    *(
        ("redis_url", value)
        for value in ("", "localhost:6379", "http://h/0", "redis://", "redis://h:x/0", "redis://h:99999")
    ),
    *(("redis_url", value) for value in ("unix://", "redis://[::1", "redis://a,b/0", "rediss://h/0?ssl_ca_certs=/no")),
    *(("redis_url", f"redis+sentinel://{value}") for value in ("h:1", "h:1/", "h:1/m/x", "h:1,:2/m", "h:1,i:x/m")),
    *(("database_url", value) for value in ("", "mysql://h/x", "postgresql:///x", "h/x", "postgresql://h:x/y")),
    *(
        ("database_url", f"postgresql://{value}")
        for value in ("a:1,b:x/y", "a,,b/y", "u:p@ss@h/y", "h/y?sslrootcert=/no")
    ),
    ("kafka_security_protocol", "TLS"),
    ("kafka_sasl_mechanism", "GSSAPI"),
    *(("kafka_sasl_oauth_url", value) for value in ("ftp://h", "https://", "file://")),
    *((f"kafka_ssl_{value}_file", "/no/such.pem") for value in ("ca", "cert", "key")),
    *(("payment_url", value) for value in ("", "ftp://h", "https://", "h")),
    *(("partitions", value) for value in (0, -1, 1.5, 1_025, "many", "")),
    *(("order_bytes_max", value) for value in (0, 900_001)),
    *(("handoff_outcomes_max", value) for value in (0, 2_001)),
    *(("batch_records_max", value) for value in (0, 20_001)),
    *(("retention_hours", value) for value in (0, 10**30)),
    *(("hold_ttl_s", value) for value in (0, -1, "inf", "nan", 1e300)),
    *(("batch_interval_s", value) for value in (-1, 5.1, "nan")),
    *(("payment_success_rate", value) for value in (-0.1, 1.1, "nan")),
    *(("payment_latency_max_s", value) for value in (-1, "inf")),
    ("payment_seed", 2**63),
    ("payment_provider", "paypal"),
    *(("admin_token", value) for value in ("short", "fifteen-signs-x", "sixteen signs and blanks", "é" * 20)),
    *(
        ("cors_origins", value)
        for value in ("shop.example", "https://a.example/", "https://a.example, https://b.example")
    ),
    ("customer_auth", "oauth"),
    ("customer_header", "X Customer"),
    ("jwt_secret_token", "x" * 31),
    *(("jwt_algorithms", value) for value in ("none", "RS256,", "RS256 ES256", "rs256")),
    *(("rate_limit_per_s", value) for value in (-1, "nan", "inf")),
    *(("rate_limit_burst", value) for value in (0, -1)),
    ("forwarded_hops", -1),
    ("app_id", "A B"),
    ("app_id", ""),
    ("topic_prefix", "a/b"),
    ("redis_prefix", ""),
    ("redis_prefix", "a{b}"),
    ("log_format", "xml"),
    ("failpoint", "nowhere:kill"),
    ("failpoint", "reserve.after_hold:explode"),
    ("failpoint", "reserve.after_hold:kill:0"),
]


@pytest.mark.parametrize(("name", "value"), FAULTY)
def test_a_value_that_can_not_be_used_is_refused_at_the_start(name: str, value: Any) -> None:
    (fault,) = faults(_env_file=None, **{name: value})
    assert fault.startswith(f"{PREFIX}{name.upper()}: ")


def test_a_latency_range_that_is_upside_down_is_refused() -> None:
    (fault,) = faults(payment_latency_min_s=2, payment_latency_max_s=1, _env_file=None)
    assert "payment_latency_max_s is below payment_latency_min_s" in fault


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("kafka", "a:1, b.c:2", "a:1,b.c:2"),
        ("kafka", "[::1]:9092", "[::1]:9092"),
        ("redis_url", "rediss://u:p@h:6380/1", None),
        ("redis_url", "unix:///run/redis.sock", None),
        ("redis_url", "redis+sentinel://u:p%40@a:1,[::1]:2,c/shop/1?sentinel_password=x", None),
        ("database_url", "postgres://u:p%40ss@h:5432/x?sslmode=require", None),
        ("database_url", "postgresql://a,b:2/x", "postgresql://a,b:2/x?target_session_attrs=read-write"),
        (
            "database_url",
            "postgresql://a,b/x?sslmode=disable",
            "postgresql://a,b/x?sslmode=disable&target_session_attrs=read-write",
        ),
        ("database_url", "postgresql://a,b/x?target_session_attrs=any", None),
        ("failpoint", "reserve.after_hold:kill:2", None),
        ("batch_interval_s", 0, None),
        ("http_port", 0, None),
    ],
)
def test_every_form_that_the_docs_promise_is_taken(name: str, value: Any, kept: Any) -> None:
    assert getattr(load(_env_file=None, **{name: value}), name) == (value if kept is None else kept)


SCRAM = {"kafka_sasl_mechanism": "SCRAM-SHA-512", "kafka_sasl_username": "u", "kafka_sasl_password": "p"}
TOKEN = {"kafka_sasl_mechanism": "OAUTHBEARER", "kafka_sasl_oauth_url": "https://h/token"}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"kafka_security_protocol": "SASL_SSL"}, "needs kafka_sasl_username and kafka_sasl_password"),
        ({"kafka_security_protocol": "SASL_SSL", **SCRAM, "kafka_sasl_password": ""}, "needs kafka_sasl_password"),
        ({"kafka_security_protocol": "SASL_SSL", **TOKEN}, "needs kafka_sasl_username and kafka_sasl_password"),
        ({**SCRAM}, "of no use with kafka_security_protocol=PLAINTEXT"),
        ({"kafka_security_protocol": "SSL", **TOKEN}, "of no use with kafka_security_protocol=SSL"),
        (
            {"kafka_security_protocol": "SASL_PLAINTEXT", **SCRAM, "kafka_ssl_ca_file": __file__},
            "ca_file is of no use",
        ),
        ({"kafka_security_protocol": "SSL", "kafka_ssl_key_file": __file__}, "set kafka_ssl_cert_file"),
    ],
)
def test_an_entry_to_kafka_that_can_not_be_meant_is_refused(overrides: dict[str, Any], told: str) -> None:
    (fault,) = faults(_env_file=None, **overrides)
    assert told in fault


def test_a_token_from_a_file_needs_no_password() -> None:
    by_file = TOKEN | {"kafka_sasl_oauth_url": "file:///run/token"}
    assert load(_env_file=None, kafka_security_protocol="SASL_SSL", **by_file).kafka_sasl_password == ""


def test_variables_that_are_none_of_ours_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA", "nowhere")
    monkeypatch.setenv("PARTITIONS", "0")
    assert load(local_dir=Path("none")).kafka == "127.0.0.1:9092"


def test_a_setting_that_is_misspelt_is_named_with_the_nearest_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{PREFIX}KAKFA", "127.0.0.1:9092")
    monkeypatch.setenv("orderstream_zzz", "1")
    (tmp_path / ".env").write_text(f"{PREFIX}HOLD_TTL=5\n{PREFIX}PARTITIONS=0\n")
    found = faults(_env_file=tmp_path / ".env")
    assert sorted(found)[:3] == [
        f"{PREFIX}HOLD_TTL: there is no such setting; {PREFIX}HOLD_TTL_S?",
        f"{PREFIX}KAKFA: there is no such setting; {PREFIX}KAFKA?",
        f"{PREFIX}PARTITIONS: Input should be greater than 0 (got '0')",
    ]
    assert sorted(found)[3:] == ["orderstream_zzz: there is no such setting"]


def test_what_kubernetes_says_of_a_service_of_our_name_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("SERVICE_HOST", "10.0.0.1"),
        ("WORKER_SERVICE_PORT_HTTP", "80"),
        ("PORT", "tcp://10.0.0.1:80"),
        ("PORT_80_TCP_ADDR", "10.0.0.1"),
    ):
        monkeypatch.setenv(f"{PREFIX}{name}", value)
    assert load(local_dir=Path("none")).kafka == "127.0.0.1:9092"


# Secrets

SECRET = "hunter2"


@pytest.mark.parametrize(
    "overrides",
    [
        {"payment_token": [SECRET]},
        {"admin_token": SECRET},
        {"jwt_secret_token": SECRET},
        {"customer_auth": "jwt", "jwt_secret_token": SECRET * 5, "jwt_key_file": "keys.json"},
        {"payment_token": None, "payment_url": f"ftp://{SECRET}@h"},
        {"database_url": f"mysql://bob:{SECRET}@h/x"},
        {"database_url": f"bob:{SECRET}@h/x"},
        {"database_url": f"postgresql://bob:{SECRET}/{SECRET}@h/x"},
        {"database_url": f"postgresql://bob:{SECRET}//@{SECRET}@h:x/x"},
        {"database_url": f"postgresql://bob:[{SECRET}]@h/x"},
        {"database_url": f"postgresql://bob:{SECRET}\u2100@h/x"},
        {"database_url": f"postgresql:///x?user=bob&password={SECRET}"},
        {"database_url": f"postgresql://bob:\n{SECRET}@h:x/x"},
        {"redis_url": f"http://:{SECRET}@h/0"},
        {"redis_url": f"redis://:{SECRET}@h:x/0"},
        {"redis_url": f"redis://:{SECRET}#@h/0", "partitions": 0},
        {"redis_url": f"redis+sentinel://:{SECRET}@h:1/m/0/x?sentinel_password={SECRET}"},
        {"database_url": f"postgresql://bob:{SECRET}@{SECRET}@h/x"},
        {"kafka_sasl_password": [SECRET]},
        {"kafka_sasl_password": SECRET},
        {"kafka_sasl_oauth_url": f"ftp://bob:{SECRET}@h?x={SECRET}"},
        {"payment_url": f"ftp://bob:{SECRET}@h"},
        {"payment_url": f"https://?token={SECRET}"},
        {"kafka": f"bob:{SECRET}@h:9092"},
        {"payment_latency_min_s": 2, "payment_token": SECRET, "database_url": f"postgresql://bob:{SECRET}@h/x"},
        {"partitions": 0, "payment_token": SECRET, "database_url": f"postgresql://bob:{SECRET}@h/x"},
    ],
)
def test_no_secret_is_shown_with_the_fault(overrides: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as caught:
        load(_env_file=None, **overrides)
    assert SECRET not in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@given(st.text(min_size=1).map(lambda text: text.replace("@", "")), st.sampled_from(["mysql://", "", "x:"]))
def test_what_is_before_an_at_is_never_shown(password: str, scheme: str) -> None:
    secret = f"s3cret{password}s3cret"
    (fault,) = faults(_env_file=None, database_url=f"{scheme}bob:{secret}@h/x")
    assert "s3cret" not in fault


def test_where_the_fault_is_can_still_be_seen() -> None:
    (fault,) = faults(database_url=f"mysql://bob:{SECRET}@db.example/x", _env_file=None)
    assert fault.endswith("(got 'mysql://…@db.example/x')")


def test_the_settings_printed_show_no_secret() -> None:
    settings = load(
        _env_file=None,
        payment_token=SECRET,
        admin_token=SECRET * 3,
        jwt_secret_token=SECRET * 5,
        database_url=f"postgresql://bob:{SECRET}@h/x",
        redis_url=f"redis://:{SECRET}@h/0",
        payment_url=f"https://bob:{SECRET}@h",
        kafka_security_protocol="SASL_SSL",
        kafka_sasl_username="bob",
        kafka_sasl_password=SECRET,
    )
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings)


# What they are


def test_every_setting_says_what_it_is() -> None:
    silent = [name for name, field in Settings.model_fields.items() if not field.description]
    assert silent == []


def test_topics_carry_the_prefix_and_heartbeats_fit_into_the_session() -> None:
    settings = load(_env_file=None, topic_prefix="shop.", session_timeout_s=8)
    assert settings.topic("orders") == "shop.orders"
    assert settings.heartbeat_interval_s == 2


def test_orders_are_kept_for_ever_or_not_shorter_than_their_records() -> None:
    assert load(_env_file=None).keep_orders_days == 0
    assert load(_env_file=None, keep_orders_days=7).keep_orders_days == 7
    assert load(_env_file=None, keep_orders_days=0.5, retention_hours=12).keep_orders_days == 0.5
    (fault,) = faults(keep_orders_days=6.9, _env_file=None)
    assert fault == (
        "settings: keep_orders_days is 6.9, and the topics keep their records for 7 days (retention_hours): 0 keeps orders"
        " for ever"
    )
    (fault,) = faults(keep_orders_days=-1, _env_file=None)
    assert fault.startswith("ORDERSTREAM_KEEP_ORDERS_DAYS: ")


@pytest.mark.parametrize(
    ("given", "algorithms"),
    [
        ({"jwt_key_file": "keys"}, ["RS256", "ES256"]),
        ({"jwt_secret_token": "x" * 32}, ["HS256"]),
        ({"jwt_key_file": "keys", "jwt_algorithms": "EdDSA"}, ["EdDSA"]),
        ({"jwt_key_file": "keys", "jwt_algorithms": "RS256,HS256"}, None),
        ({"jwt_secret_token": "x" * 32, "jwt_algorithms": "RS256"}, None),
        ({"jwt_secret_token": "x" * 32, "jwt_key_file": "keys"}, None),
    ],
)
def test_a_public_key_is_never_taken_for_a_secret(given: dict[str, Any], algorithms: list[str] | None) -> None:
    if algorithms is None:
        (fault,) = faults(_env_file=None, customer_auth="jwt", **given)
        assert fault.startswith("settings: ")
    else:
        assert load(_env_file=None, customer_auth="jwt", **given).jwt_algorithms_allowed == algorithms


def test_settings_do_not_change() -> None:
    settings = load(_env_file=None)
    with pytest.raises(ValueError):
        settings.partitions = 9  # type: ignore[misc]
