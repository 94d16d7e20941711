"""Every knob of orderstream, with its default, its unit and why it exists.

Read from the environment (prefix ``ORDERSTREAM_``) and from a ``.env`` file.  The three engine addresses default to the
engines that ``orderstream up`` started; where none run, to the standard local ports.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import parse_qsl, urlsplit

from dotenv import dotenv_values
from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from orderstream.errors import OrderstreamError, SettingsError
from orderstream.failpoints import parse

PREFIX = "ORDERSTREAM_"
ENGINES_FILE = "engines.json"
ORDER_UNITS_MAX = 9_000_000
"""Units of one order at most: at 10^12 cents each, the greatest price, their total is below 2^63, which is all that a column
holds."""


def project_dir() -> Path:
    """Return the source checkout that this package runs from, or the current folder when it runs from a wheel."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() else Path.cwd()


def _hosts(value: str) -> str:
    parts = [part.strip() for part in value.split(",")]
    for part in parts:
        host, _, port = part.rpartition(":")
        if not re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:.]+\]", host) or not re.fullmatch(r"[0-9]{1,5}", port):
            raise ValueError("expected host:port, or several of them separated by commas")
        if not 0 < int(port) < 65536:
            raise ValueError(f"{port} is no port: expected 1 to 65535")
    return ",".join(parts)


_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
"""What URLs of Postgres and Redis call files."""


def _readable(file: str) -> str:
    if file and not os.access(file, os.R_OK):
        raise ValueError(f"{file} is no file that this account can read")
    return file


def hosts_of(url: str) -> list[str]:
    """Return a URL for each of the hosts that a URL names, separated by commas."""
    parts = urlsplit(url)
    entry, at, hosts = parts.netloc.rpartition("@")
    return [parts._replace(netloc=f"{entry}{at}{host}").geturl() for host in hosts.split(",")]


def _url(*schemes: str) -> AfterValidator:
    def check(value: str) -> str:
        try:
            urls = [urlsplit(one) for one in hosts_of(value)]
            _ = [url.port for url in urls]
            mixed_up = "@" in urls[0].netloc.rpartition("@")[0]
        except ValueError:  # its message may quote a part of the password
            mixed_up = True
        if mixed_up:
            raise ValueError("expected a URL; a sign like / or @ in its password must be written as %2F, %40")
        scheme, wanted = urls[0].scheme, " or ".join(f"{s}://" for s in schemes)
        if scheme not in schemes or not all(url.path if scheme == "unix" else url.hostname for url in urls):
            raise ValueError(f"expected a URL that starts with {wanted}")
        several = scheme.startswith("postgres") or scheme.endswith("+sentinel")
        if len(urls) > 1 and not several:
            raise ValueError("expected one host")
        if scheme.endswith("+sentinel") and not re.fullmatch(r"/[^/]+(/[0-9]+)?", urls[0].path):
            raise ValueError("expected …+sentinel://host:port,host:port/name-of-the-primary/number-of-the-database")
        options = dict(parse_qsl(urls[0].query))
        for name in options.keys() & {*_FILES}:
            _readable(options[name])
        if len(urls) > 1 and scheme.startswith("postgres") and "target_session_attrs" not in options:
            value += ("&" if options else "?") + "target_session_attrs=read-write"
        return value

    return AfterValidator(check)


def _own_url(value: str) -> str:
    if value and (urlsplit(value).scheme != "http" or not urlsplit(value).hostname):
        raise ValueError("expected a URL that starts with http://, or nothing")
    return value


def _token_url(value: str) -> str:
    url = urlsplit(value)
    if value and not (url.path if url.scheme == "file" else url.scheme in ("http", "https") and url.hostname):
        raise ValueError("expected a URL that starts with https://, http:// or file:///")
    return value


def _failpoint(value: str) -> str:
    parse(value)
    return value


def _token(value: str) -> str:
    if value and not re.fullmatch(r"[A-Za-z0-9._~+/-]{16,512}=*", value):
        raise ValueError("expected 16 to 512 letters, digits and signs of -._~+/, as `openssl rand -hex 32` makes them")
    return value


Positive = Annotated[int, Field(gt=0, lt=2**31)]
Seconds = Annotated[float, Field(gt=0, le=366 * 86_400)]  # at most a year: for ever is no duration that Postgres knows


_ORIGIN = r"https?://[A-Za-z0-9.\[\]:-]+"
_ALGORITHM = r"((HS|RS|ES|PS)(256|384|512)|EdDSA)"


class Settings(BaseSettings):
    """The settings of one process.  Units are at the end of the names (``_s`` seconds, ``_bytes``)."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        env_file_encoding="utf-8",
        extra="ignore",
        frozen=True,
        allow_inf_nan=False,
    )

    # Engines
    kafka: Annotated[str, AfterValidator(_hosts)] = Field(
        "127.0.0.1:9092", description="Kafka bootstrap servers, host:port[,host:port]"
    )
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how Kafka is entered; see [ENGINES.md](ENGINES.md), also for Redis and Postgres"
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = Field(
        "PLAIN", description="with SASL: the mechanism"
    )
    kafka_sasl_username: str = Field("", description="with SASL: the user; with OAUTHBEARER: the id of the client")
    kafka_sasl_password: str = Field(
        "", description="with SASL: the password; with OAUTHBEARER: the secret of the client", repr=False
    )
    kafka_sasl_oauth_url: Annotated[str, AfterValidator(_token_url)] = Field(
        "",
        description="with OAUTHBEARER: the token endpoint, for the client credentials grant; or file:///… of a token that"
        " somebody renews",
        repr=False,
    )
    kafka_sasl_oauth_scope: str = Field("", description="with OAUTHBEARER: the scope that is asked for, where one is")
    kafka_ssl_ca_file: Annotated[str, AfterValidator(_readable)] = Field(
        "", description="with SSL: certificates that sign the brokers', PEM; empty: the system's"
    )
    kafka_ssl_cert_file: Annotated[str, AfterValidator(_readable)] = Field(
        "", description="with SSL: our certificate, PEM, where the brokers ask for one"
    )
    kafka_ssl_key_file: Annotated[str, AfterValidator(_readable)] = Field(
        "", description="with SSL: its key, PEM, where it is not in the same file"
    )
    kafka_ssl_key_password: str = Field("", description="with SSL: the key's password, where it has one", repr=False)
    redis_url: Annotated[str, _url("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")] = Field(
        "redis://127.0.0.1:6379/0", description="Redis, the gate in front of the stock counts", repr=False
    )
    database_url: Annotated[str, _url("postgresql", "postgres")] = Field(
        "postgresql://127.0.0.1:5432/orderstream",
        description="Postgres, the durable truth; of several hosts the one that can be written to",
        repr=False,
    )
    local_dir: Path = Field(
        default_factory=lambda: project_dir() / ".local",
        description="data, logs and pids of the engines that `orderstream up` starts",
    )

    # Topology
    app_id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,60}$")] = Field(
        "orderstream", description="consumer group, and first part of the changelog topics' names"
    )
    topic_prefix: Annotated[str, Field(pattern=r"^[a-zA-Z0-9._-]{0,60}$")] = Field(
        "", description="put before every topic name: several pipelines on one Kafka"
    )
    redis_prefix: Annotated[str, Field(pattern=r"^[a-zA-Z0-9._-]{1,60}$")] = Field(
        "orderstream", description="first part of every Redis key and channel"
    )
    partitions: Annotated[int, Field(gt=0, le=1024)] = Field(
        8,
        description="partitions of every topic; the bound on the number of useful workers. Fixed once `orderstream init`"
        " has made the database",
    )
    replication_factor: Positive = Field(1, description="copies of every topic partition; 3 in production")
    retention_hours: Positive = Field(168, description="how long orders, events and commands stay replayable, in hours")
    retention_inner_hours: Positive = Field(
        48, description="how long the topics between homes and owners keep their records, in hours"
    )
    keep_orders_days: Annotated[float, Field(ge=0, le=36_500)] = Field(
        0.0,
        description="how long orders that have ended stay in Postgres, in days; a worker removes older ones once Kafka has"
        " removed them too. 0: for ever; else not below the topics' retention",
    )

    # Limits of an order
    order_lines_max: Positive = Field(
        100,
        description="lines of one order, after merging those of the same product; times `line_quantity_max` at most"
        f" {ORDER_UNITS_MAX:,}",
    )
    line_quantity_max: Annotated[int, Field(gt=0, le=1_000_000)] = Field(10_000, description="units of one line")
    order_bytes_max: Annotated[int, Field(gt=0, le=900_000)] = Field(65_536, description="size of one order record")

    # Stages
    batch_records_max: Annotated[int, Field(gt=0, le=20_000)] = Field(
        2_000, description="orders or lines that a stage decides in one go: one Lua call a product, one commit"
    )
    batch_interval_s: Annotated[float, Field(ge=0, le=5)] = Field(
        0.01, description="seconds between two batches of reserve, and of commit, at least, unless a whole one waits"
    )
    handoff_outcomes_max: Annotated[int, Field(gt=0, le=2_000)] = Field(
        200, description="rows in one record of the topics between homes and owners"
    )
    hold_ttl_s: Seconds = Field(
        600.0,
        description="how long an order may stay unpaid before it expires and its units are free again, in seconds",
    )
    expiry_interval_s: Seconds = Field(
        1.0, description="how often a worker looks for orders of its homes past that time, in seconds"
    )
    session_timeout_s: Seconds = Field(6.0, description="after how long a silent worker loses its partitions, seconds")
    commit_interval_s: Seconds = Field(0.5, description="how often consumed offsets are committed, in seconds")
    stall_timeout_s: Seconds = Field(
        60.0, description="how long a worker may make no progress, without a reason, before it ends itself, in seconds"
    )
    retry_wait_max_s: Seconds = Field(
        5.0, description="longest pause between tries while an engine is unavailable, seconds"
    )
    postgres_pool_max: Positive = Field(8, description="Postgres connections of one process")
    postgres_timeout_s: Seconds = Field(30.0, description="longest wait for one Postgres statement, in seconds")
    redis_timeout_s: Seconds = Field(2.0, description="longest wait for one Redis reply, in seconds")

    # Payment
    payment_provider: Literal["simulated", "http"] = Field("simulated", description="which payment provider charges")
    payment_in_flight_max: Positive = Field(
        1_000, description="requests to the provider under way at once, in one worker"
    )
    payment_rate_max: Annotated[float, Field(gt=0, le=1_000_000)] = Field(
        5_000.0, description="requests a second to the provider, from one worker; at most half of them ask again"
    )
    payment_success_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="simulated provider: share of orders whose charge succeeds; fixed for each order by the seed"
    )
    payment_latency_min_s: Annotated[float, Field(ge=0, le=3600)] = Field(
        0.0, description="simulated provider: fastest answer, in seconds"
    )
    payment_latency_max_s: Annotated[float, Field(ge=0, le=3600)] = Field(
        0.0, description="simulated provider: slowest answer, in seconds"
    )
    payment_seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = Field(
        1, description="simulated provider: which orders it declines and how long it takes"
    )
    payment_url: Annotated[str, _url("http", "https")] = Field(
        "http://127.0.0.1:8090", description="HTTP provider: base URL; POST /charges, /refunds and /voids", repr=False
    )
    payment_token: str = Field("", description="HTTP provider: bearer token", repr=False)
    payment_timeout_s: Seconds = Field(10.0, description="HTTP provider: longest wait for one answer, in seconds")

    # Ingress and pages
    http_host: str = Field("127.0.0.1", description="address of the ingress; loopback by default")
    http_port: Annotated[int, Field(ge=0, lt=65536)] = Field(
        8080, description="port of the ingress; 0 picks a free one"
    )
    verdict_timeout_s: Annotated[float, Field(ge=0, le=60)] = Field(
        2.0, description="how long a POST waits for the reservation's verdict before it answers 202, in seconds"
    )
    admin_token: Annotated[str, AfterValidator(_token)] = Field(
        "", description="bearer token of the admin routes, 16 characters at least; without one they are off", repr=False
    )
    admin_token_file: str = Field(
        "",
        description="file with admin tokens, `NAME TOKEN` on each line, read when the ingress starts; besides the"
        " variable's, whose name is admin",
    )
    cors_origins: Annotated[str, Field(pattern=rf"^(\*|{_ORIGIN}(,{_ORIGIN})*)?$")] = Field(
        "",
        description="origins whose pages may call the API (CORS), like https://shop.example, separated by commas; *: any,"
        " without cookies",
    )
    customer_auth: Literal["none", "header", "jwt"] = Field(
        "none",
        description="who names the customer of a request: nobody, a header of your proxy, or a signed token (JWT); a named"
        " one finds own orders only",
    )
    customer_header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,100}$")] = Field(
        "X-Customer-Id",
        description="header: which one; the proxy has to set it on every request, and clients must not get past the proxy",
    )
    jwt_key_file: str = Field(
        "", description="JWT: file with the public keys, a JWKS or one in PEM, read when the ingress starts"
    )
    jwt_secret_token: Annotated[str, Field(pattern=r"^$|^.{32,}$")] = Field(
        "", description="JWT: secret in place of keys, 32 characters at least (HS256, HS384, HS512)", repr=False
    )
    jwt_algorithms: Annotated[str, Field(pattern=rf"^({_ALGORITHM}(,{_ALGORITHM})*)?$")] = Field(
        "", description="JWT: the algorithms that count, separated by commas; empty: RS256,ES256, with a secret HS256"
    )
    jwt_issuer: str = Field("", description="JWT: what its `iss` has to be; empty: anything")
    jwt_audience: str = Field(
        "", description="JWT: what its `aud` has to name; empty: a token for an audience does not count"
    )
    jwt_claim: Annotated[str, Field(min_length=1)] = Field("sub", description="JWT: the claim that names the customer")
    rate_limit_per_s: Annotated[float, Field(ge=0, le=1_000_000)] = Field(
        0.0, description="requests a second of one client to /api, counted in Redis over all ingresses; 0: no limit"
    )
    rate_limit_burst: Positive = Field(100, description="requests that a client may have at once under that limit")
    connections_max: Positive = Field(
        15_000,
        description="connections that an ingress, or a worker's pages, takes at once; further ones are answered 503",
    )
    idle_connections_max: Positive = Field(
        1_000, description="connections of one client without a request in hand; a further one is answered 503"
    )
    drain_s: Annotated[float, Field(ge=0, le=600)] = Field(
        5.0,
        description="how long an ingress still takes connections after SIGTERM, when /ready says already that it leaves, in"
        " seconds: until its balancer has noticed",
    )
    forwarded_hops: Annotated[int, Field(ge=0, le=10)] = Field(
        0, description="proxies of yours before the ingress that append to X-Forwarded-For; it names the client then"
    )
    web_host: str = Field("127.0.0.1", description="address of a worker's stats pages")
    web_port: Annotated[int, Field(ge=0, lt=65536)] = Field(6066, description="port of a worker's pages; 0: a free one")
    web_url: Annotated[str, AfterValidator(_own_url)] = Field(
        "",
        description="URL at which other workers reach this one's pages; without: web_host (the machine's name where that is"
        " every address) and web_port",
    )
    web_enabled: bool = Field(True, description="serve the stats pages")

    faust_metrics: bool = Field(
        False, description="add Faust's own metrics to a worker's; they cost each chunk a little"
    )
    failpoint: Annotated[str, AfterValidator(_failpoint)] = Field(
        "", description="for tests: where a worker fails, stage.place:kill|freeze|raise[:nth]"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level that is logged")
    log_format: Literal["auto", "console", "json"] = Field("auto", description="auto: console on a terminal, else json")

    @model_validator(mode="after")
    def _ranges(self) -> Settings:
        if self.payment_latency_max_s < self.payment_latency_min_s:
            raise ValueError("payment_latency_max_s is below payment_latency_min_s: raise it, or lower the other one")
        if self.session_timeout_s <= 4 * self.heartbeat_interval_s * 0.9:
            raise ValueError("session_timeout_s is too short for four heartbeats")
        if self.order_lines_max * self.line_quantity_max > ORDER_UNITS_MAX:
            raise ValueError(
                f"{self.order_lines_max} lines (order_lines_max) of {self.line_quantity_max} units (line_quantity_max) are"
                f" more than {ORDER_UNITS_MAX} in one order, of which a total can be told at every price: lower one of them"
            )
        if self.customer_auth == "jwt":
            if bool(self.jwt_secret_token) == bool(self.jwt_key_file):
                raise ValueError("customer_auth is jwt: set jwt_key_file, or jwt_secret_token, and not both")
            wrong = [
                name for name in self.jwt_algorithms_allowed if name.startswith("HS") != bool(self.jwt_secret_token)
            ]
            if wrong:
                raise ValueError(
                    f"jwt_algorithms has {', '.join(wrong)}: with jwt_secret_token it may have HS256, HS384 and HS512 only,"
                    " with jwt_key_file none of them"
                )
        if 0 < self.keep_orders_days * 24 < self.retention_hours:
            raise ValueError(
                f"keep_orders_days is {self.keep_orders_days:g}, and the topics keep their records for"
                f" {self.retention_hours / 24:g} days (retention_hours): 0 keeps orders for ever"
            )
        return self

    @model_validator(mode="after")
    def _kafka_entry(self) -> Settings:
        way = self.kafka_security_protocol
        oauth = self.kafka_sasl_mechanism == "OAUTHBEARER"
        of_a_file = self.kafka_sasl_oauth_url.startswith("file:")
        needed = ["kafka_sasl_oauth_url"] if oauth else []
        needed += [] if oauth and of_a_file else ["kafka_sasl_username", "kafka_sasl_password"]
        if way.startswith("SASL") and (missing := [name for name in needed if not getattr(self, name)]):
            raise ValueError(f"{way} with {self.kafka_sasl_mechanism} needs {' and '.join(missing)}")
        for kind, is_used in (("kafka_sasl_", way.startswith("SASL")), ("kafka_ssl_", way.endswith("SSL"))):
            fields = {name: field for name, field in Settings.model_fields.items() if name.startswith(kind)}
            useless = [name for name, field in fields.items() if getattr(self, name) != field.default]
            if useless and not is_used:
                raise ValueError(f"{' and '.join(useless)} is of no use with kafka_security_protocol={way}")
        if self.kafka_ssl_key_file and not self.kafka_ssl_cert_file:
            raise ValueError("kafka_ssl_key_file is a key without its certificate: set kafka_ssl_cert_file")
        return self

    @property
    def heartbeat_interval_s(self) -> float:
        """A quarter of the session timeout: three beats may get lost."""
        return self.session_timeout_s / 4

    @property
    def jwt_algorithms_allowed(self) -> list[str]:
        """The algorithms by which a customer's token may be signed."""
        return (self.jwt_algorithms or ("HS256" if self.jwt_secret_token else "RS256,ES256")).split(",")

    def topic(self, name: str) -> str:
        """Return the name of one of our topics on the broker."""
        return f"{self.topic_prefix}{name}"


def secret(name: str) -> bool:
    """Tell whether a setting's value is never shown."""
    return name.lower().endswith(("_token", "_password"))


def public(url: str) -> str:
    """Return a URL without its user and password, for logs and messages."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="").geturl()


def writable(folder: Path) -> Path:
    """Return a folder of ours, made where it was missing.

    Raises:
        OrderstreamError: this account may not write there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        why = "" if os.access(folder, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)
    except OSError as error:
        why = str(error.strerror)
    if why:
        raise OrderstreamError(f"{folder} can't be written to: {why}\nset {PREFIX}LOCAL_DIR to a folder that can be")
    return folder


def local_engines(local_dir: Path) -> dict[str, str]:
    """Return the addresses of the engines that ``orderstream up`` started, by setting name; empty when none run.

    Raises:
        SettingsError: something else than `orderstream up` wrote the file.
    """
    file = local_dir / ENGINES_FILE
    try:
        if not file.is_file():
            return {}
        found = json.loads(file.read_text())
    except PermissionError as error:
        raise SettingsError([f"{PREFIX}LOCAL_DIR: {file} can't be read: {error.strerror}"]) from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise SettingsError([f"{file}: can't be read; remove it, and run `orderstream up` again"])
    return {key: str(found[key]) for key in ("kafka", "redis_url", "database_url") if key in found}


def _shown(value: object) -> str:
    """Return what was given for a setting, without what may be a password: all before an @, all behind a ?."""
    if not isinstance(value, str):
        return repr(value)
    return repr(re.sub(r"\?.*", "?…", re.sub(r"^([\w+.-]*://)?.*@", r"\1…@", value, flags=re.DOTALL), flags=re.DOTALL))


def _misspelt(env_file: Any) -> list[str]:
    """Return a fault for each variable with our prefix that is no setting, but for what Kubernetes says of services."""
    given = {**(dotenv_values(env_file) if env_file else {}), **os.environ}
    faults = []
    for variable, value in given.items():
        name = variable.upper().removeprefix(PREFIX).lower()
        if not variable.upper().startswith(PREFIX) or name in Settings.model_fields:
            continue
        if not re.search(r"_service_(host|port)|_port_[0-9]+_(tcp|udp)", f"_{name}") and not (value or "").startswith(
            "tcp://"
        ):
            near = difflib.get_close_matches(name, Settings.model_fields, n=1)
            faults.append(f"{variable}: there is no such setting" + (f"; {PREFIX}{near[0].upper()}?" if near else ""))
    return faults


def load(**overrides: Any) -> Settings:
    """Read the settings of this process.

    Explicit ``overrides`` win, then the environment and ``.env``, then the engines that ``orderstream up`` started, then
    the defaults.

    Raises:
        SettingsError: naming every setting that is wrong, or misspelt, at once.
    """
    misspelt = _misspelt(overrides.get("_env_file", Settings.model_config["env_file"]))
    try:
        settings = Settings(**overrides)
        if misspelt:
            raise SettingsError(misspelt)
        found = local_engines(settings.local_dir)
        unset = {key: value for key, value in found.items() if key not in settings.model_fields_set}
        return Settings(**{**overrides, **unset}) if unset else settings
    except ValidationError as error:
        faults = misspelt
        for fault in error.errors():
            name = PREFIX + str(fault["loc"][0]).upper() if fault["loc"] else "settings"
            shown = "" if secret(name) or not fault["loc"] else f" (got {_shown(fault['input'])})"
            faults.append(f"{name}: {fault['msg'].removeprefix('Value error, ')}{shown}")
        raise SettingsError(faults) from None


def document() -> str:
    """Return the table of ``docs/SETTINGS.md``: variable, default, meaning, of every setting, in the order of this file."""
    rows = ["| variable | default | what it is for |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "`.local` in the checkout" if field.default_factory is not None else f"`{field.default}`"
        if field.default == "":
            default = "empty"
        choices = get_args(field.annotation)
        allowed = f" ({', '.join(f'`{choice}`' for choice in choices)})" if choices else ""
        described = str(field.description).replace("|", "\\|")
        rows.append(f"| `{PREFIX}{name.upper()}` | {default} | {described}{allowed} |")
    return "\n".join(rows)
