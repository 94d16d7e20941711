"""Who may do what, and the headers that every answer carries for browsers.

Admin routes ask for a bearer token (RFC 6750).  Without a token in the settings they are off.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path

from aiohttp import hdrs, web

from orderstream.errors import SettingsError
from orderstream.http.problems import Problem
from orderstream.settings import PREFIX, Settings

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

_BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*)", re.IGNORECASE)
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,512}=*")


async def guard(_request: web.Request, response: web.StreamResponse) -> None:
    """Put :data:`HEADERS` on an answer."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers[hdrs.SERVER] = SERVER


def read_tokens(file: Path) -> list[str]:
    """Return the tokens of a file, one a line; empty lines and lines that begin with # are none.

    Raises:
        SettingsError: it can't be read, has none, or a line is no token.  No line is quoted.
    """
    name = f"{PREFIX}ADMIN_TOKEN_FILE"
    try:
        with file.open("rb") as opened:
            text = opened.read(TOKEN_FILE_BYTES_MAX + 1)
        lines = text.decode("ascii").splitlines()
    except OSError as error:
        raise SettingsError([f"{name}: {file}: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise SettingsError([f"{name}: {file} holds more than letters, digits and signs of -._~+/"]) from None
    if len(text) > TOKEN_FILE_BYTES_MAX:
        raise SettingsError([f"{name}: {file} has more than {TOKEN_FILE_BYTES_MAX} bytes"])
    tokens = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        if not _TOKEN.fullmatch(line.strip()):
            raise SettingsError([f"{name}: {file}, line {number}: no token; see {PREFIX}ADMIN_TOKEN"])
        tokens.append(line.strip())
    if not tokens:
        raise SettingsError([f"{name}: {file} holds no token"])
    return tokens


class Admins:
    """The tokens that an admin may have; only their digests are kept.

    Raises:
        SettingsError: the token file can't be used.
    """

    def __init__(self, settings: Settings) -> None:
        tokens = [settings.admin_token] if settings.admin_token else []
        if settings.admin_token_file:
            tokens += read_tokens(Path(settings.admin_token_file))
        self._digests = [_digest(token) for token in tokens]

    def check(self, request: web.Request) -> None:
        """Let an admin pass.  Every token is compared, each in the same time whatever the given one is.

        Raises:
            Problem: ``admin-off``, ``unauthorized``.
        """
        if not self._digests:
            raise Problem("admin-off", "This ingress has no admin token, so this is off.")
        given = request.headers.getall(hdrs.AUTHORIZATION, [])
        bearer = _BEARER.fullmatch(given[0].strip()) if len(given) == 1 else None
        digest = _digest(bearer[1] if bearer else "")
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if bearer is None or not any(matches):
            challenge = 'Bearer realm="orderstream"' + (', error="invalid_token"' if bearer else "")
            detail = (
                "The bearer token is none of the admins'."
                if bearer
                else "Send an admin's token: Authorization: Bearer …"
            )
            raise Problem("unauthorized", detail, headers={hdrs.WWW_AUTHENTICATE: challenge})


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
