"""Who may do what, and the headers that every answer carries for browsers.

Admin routes ask for a bearer token (RFC 6750).  Without a token in the settings they are off.  A customer is who a header of
a trusted proxy names, or a signed token (JWT, RFC 7519); without either setting anybody speaks for every customer.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp_cors
import jwt
from aiohttp import hdrs, web
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from pydantic import TypeAdapter, ValidationError

from orderstream.errors import SettingsError
from orderstream.http.problems import Problem
from orderstream.settings import PREFIX, Settings
from orderstream.streams.orders import Id

SERVER = "orderstream"
"""Instead of names and versions of libraries."""

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Server": SERVER,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""What every answer carries unless its handler says otherwise.  No cache may keep an order, a count or an error."""

TOKEN_FILE_BYTES_MAX = 64 * 1024

ALLOWED = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "If-Match",
    "If-None-Match",
    "Last-Event-ID",
    "Prefer",
)
EXPOSED = ("ETag", "Location", "Preference-Applied", "RateLimit", "RateLimit-Policy", "Retry-After", "WWW-Authenticate")
"""Headers that pages of other origins may send, and read."""

CORS_S = 600
"""How long a browser need not ask again what such a page may do."""

NAMELESS = "admin"
"""Who has a token without a name."""

JWT_CLOCKS_S = 10
"""How far the clock of who signs a token may differ from ours."""

_BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*)", re.IGNORECASE)
_NAMED = re.compile(r"(?:([A-Za-z0-9][A-Za-z0-9._@-]{0,63})[ \t]+)?([A-Za-z0-9._~+/-]{16,512}=*)")
_CUSTOMER: TypeAdapter[Any] = TypeAdapter(Id)


async def guard(_request: web.Request, response: web.StreamResponse) -> None:
    """Put :data:`HEADERS` on an answer."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers[hdrs.SERVER] = SERVER
    response.headers.add(
        hdrs.VARY, hdrs.ORIGIN
    )  # also where it has none: a cache may hold it for a page of another origin


def share(app: web.Application, origins: Sequence[str]) -> None:
    """Let pages of these origins call the API (CORS); ``*``: of any, without cookies.  Call it behind the last route."""
    options = aiohttp_cors.ResourceOptions(  # type: ignore[no-untyped-call]
        allow_credentials="*" not in origins, expose_headers=EXPOSED, allow_headers=ALLOWED, max_age=CORS_S
    )
    cors = aiohttp_cors.setup(app, defaults=dict.fromkeys(origins, options))
    for route in [*app.router.routes()]:
        if route.resource is not None and route.resource.canonical.startswith("/api/"):
            cors.add(route)


class Token(NamedTuple):
    """An admin's token."""

    name: str
    token: str


def _read(setting: str, file: Path) -> str:
    """Return a small file of keys or tokens.

    Raises:
        SettingsError: it can't be read.
    """
    name = f"{PREFIX}{setting.upper()}"
    try:
        with file.open("rb") as opened:
            text = opened.read(TOKEN_FILE_BYTES_MAX + 1)
        if len(text) > TOKEN_FILE_BYTES_MAX:
            raise SettingsError([f"{name}: {file} has more than {TOKEN_FILE_BYTES_MAX} bytes"])
        return text.decode("ascii")
    except OSError as error:
        raise SettingsError([f"{name}: {file}: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise SettingsError([f"{name}: {file} holds more than ASCII"]) from None


def read_tokens(file: Path) -> list[Token]:
    """Return the tokens of a file, ``NAME TOKEN`` on each line, or a token alone; empty lines and those with # are none.

    Raises:
        SettingsError: it can't be read, has none, or a line is no token.  No line is quoted.
    """
    name = f"{PREFIX}ADMIN_TOKEN_FILE"
    tokens = []
    for number, line in enumerate(_read("admin_token_file", file).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        named = _NAMED.fullmatch(line.strip())
        if not named:
            raise SettingsError([f"{name}: {file}, line {number}: no token; see {PREFIX}ADMIN_TOKEN"])
        tokens.append(Token(named[1] or NAMELESS, named[2]))
    if not tokens:
        raise SettingsError([f"{name}: {file} holds no token"])
    return tokens


def read_keys(file: Path) -> dict[str | None, Any]:
    """Return the public keys of a file by their ids: a set of them (JWKS, RFC 7517), or one in PEM, which has none.

    Raises:
        SettingsError: it can't be read, or has no key.
    """
    text = _read("jwt_key_file", file)
    try:
        if not text.lstrip().startswith("{"):
            return {None: load_pem_public_key(text.encode())}
        keys = [key for key in jwt.PyJWKSet.from_json(text).keys if key.public_key_use in (None, "sig")]
        if not keys or any(key.key_type == "oct" for key in keys):
            raise ValueError("no public keys")
    except (jwt.PyJWTError, ValueError):
        fault = f"{PREFIX}JWT_KEY_FILE: {file}: neither a JWKS with public keys nor one in PEM"
        raise SettingsError([fault]) from None
    return {key.key_id: key for key in keys}


class Access:
    """Who asks: an admin, by name, or a customer.  Of admins' tokens only digests are kept.

    Raises:
        SettingsError: a file of tokens or keys can't be used.
    """

    def __init__(self, settings: Settings) -> None:
        tokens = [Token(NAMELESS, settings.admin_token)] if settings.admin_token else []
        if settings.admin_token_file:
            tokens += read_tokens(Path(settings.admin_token_file))
        self._admins = [(_digest(token), name) for name, token in tokens]
        self._settings = settings
        self._keys: Mapping[str | None, Any] = {}
        if settings.customer_auth == "jwt":
            secret, file = settings.jwt_secret_token, settings.jwt_key_file
            self._keys = {None: secret} if secret else read_keys(Path(file))

    def admin(self, request: web.Request) -> str:
        """Let an admin pass; return the name.

        Raises:
            Problem: ``admin-off``, ``unauthorized``.
        """
        if not self._admins:
            raise Problem("admin-off", "This ingress has no admin token, so this is off.")
        bearer = _bearer(request)
        name = self._name(bearer)
        if name is None:
            detail = (
                "The bearer token is none of the admins'."
                if bearer
                else "Send an admin's token: Authorization: Bearer …"
            )
            raise _unauthorized(detail, bearer)
        return name

    def customer(self, request: web.Request) -> str | None:
        """Return the customer whose orders alone a request may be about; None: those of any.

        So it is for an admin, and where nobody has to say who they are.

        Raises:
            Problem: ``unauthorized``, nobody is named.
        """
        if self._settings.customer_auth == "none":
            return None
        bearer = _bearer(request)
        if self._name(bearer) is not None:
            return None
        header = self._settings.customer_header if self._settings.customer_auth == "header" else None
        if header is not None:
            named = request.headers.getall(header, [])
            found = named[0] if len(named) == 1 else None
            wrong = "names no customer" if len(named) == 1 else "is given more than once" if named else "is missing"
            fault = f"The header {header} {wrong}."
        else:
            found, fault = self._claimed(bearer)
        try:
            return str(_CUSTOMER.validate_python(found))
        except ValidationError:
            raise _unauthorized(fault, bearer, header) from None

    def _name(self, bearer: str | None) -> str | None:
        """Return whose token this is.  Every one is compared, each in the same time whatever the given one is."""
        digest = _digest(bearer or "")
        matches = [name for known, name in self._admins if hmac.compare_digest(digest, known)]
        return matches[0] if matches and bearer else None

    def _claimed(self, bearer: str | None) -> tuple[Any, str]:
        """Return the customer that a token names, or None and what is wrong."""
        settings = self._settings
        if bearer is None:
            return None, "Send a customer's token: Authorization: Bearer …"
        try:
            key = self._keys.get(jwt.get_unverified_header(bearer).get("kid"), self._keys.get(None))
            if key is None and len(self._keys) == 1:
                (key,) = self._keys.values()
            claims = jwt.decode(
                bearer,
                key,
                algorithms=settings.jwt_algorithms_allowed,
                issuer=settings.jwt_issuer or None,
                audience=settings.jwt_audience or None,
                leeway=JWT_CLOCKS_S,
                options={"require": ["exp"], "verify_sub": False},
            )
            if any(type(claims.get(name, 0)) not in (int, float) for name in ("exp", "nbf", "iat")):
                raise ValueError("a time is a number (RFC 7519); PyJWT takes texts too")
        except jwt.ExpiredSignatureError:
            return None, "The token has expired."
        except (jwt.PyJWTError, TypeError, ValueError):  # PyJWT does not foresee every header
            return None, "The token is not valid here: signature, algorithm, time, issuer or audience do not fit."
        return claims.get(settings.jwt_claim), f"The token's claim {settings.jwt_claim} names no customer."


def _bearer(request: web.Request) -> str | None:
    given = request.headers.getall(hdrs.AUTHORIZATION, [])
    bearer = _BEARER.fullmatch(given[0].strip()) if len(given) == 1 else None
    return bearer[1] if bearer else None


def _unauthorized(detail: str, bearer: str | None, header: str | None = None) -> Problem:
    """Make the problem of who is not known; ``header``: the one that a proxy should have set."""
    challenge = 'Bearer realm="orderstream"' + (', error="invalid_token"' if bearer else "")
    if header is not None:  # RFC 9110 wants a challenge with each 401, and has no scheme for this
        challenge = f'Header realm="orderstream", name="{header}"'
    return Problem("unauthorized", detail, headers={hdrs.WWW_AUTHENTICATE: challenge})


def not_yours() -> Problem:
    """Make the problem of a customer who speaks for another one."""
    return Problem("forbidden", "This is another customer's; a customer asks for own orders only.")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
