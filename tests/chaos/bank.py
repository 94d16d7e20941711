"""A payment provider with every fault: slow, failing, silent, answering twice; idempotent by key, as real ones are."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import orjson

HEAD = "HTTP/1.1 {status} Said\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n{more}\r\n"


class Said(NamedTuple):
    """An answer that a test puts in the place of the bank's own; ``status`` 0: none ever comes."""

    status: int
    body: bytes = b""
    more: str = ""
    """Headers, each with its line end."""


Instead = Callable[[str, str, dict[str, Any]], Awaitable[Said | None]]
"""Asked with path, key and body before a request has an effect; None: it goes on as ever."""


class Bank:
    """Serves ``/charges``, ``/refunds``, ``/voids`` and ``/ledger``; what it does with a request is drawn from its seed.

    Attributes:
        failing: share of the requests that get a 500, half of them after they took effect.
        silent: share of the requests that are never answered, half of them after they took effect.
        doubled: share of the answers that are sent twice.
        lenient: declines nobody.
        refusing: share of the orders of which it will not give money back, for good.
        refused: orders of which it has said so.
        quickest_s: quickest answer, in seconds.
        latency_s: slowest answer, in seconds.
        charges: by idempotency key, what was asked and what became of it.
        refunds: by idempotency key, how often it was asked for.
        voided: keys under which no charge stands, now or later.
        asked: by idempotency key, how often a charge was asked for.
        faults: how often it failed, was silent, answered twice.
        in_flight_most: requests that it was working on at once, at most.
        requests: when each request came, by ``time.monotonic``, its path and its key.
        instead: what is answered in place of what the bank would do.
    """

    def __init__(
        self, seed: int = 1, *, failing: float = 0.0, silent: float = 0.0, doubled: float = 0.0, latency_s: float = 0.05
    ):
        self.failing, self.silent, self.doubled, self.latency_s = failing, silent, doubled, latency_s
        self.quickest_s, self.lenient, self.refusing = 0.0, False, 0.0
        self.refused: set[str] = set()
        self.charges: dict[str, dict[str, Any]] = {}
        self.refunds: Counter[str] = Counter()
        self.voided: set[str] = set()
        self.asked: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.in_flight = self.in_flight_most = 0
        self.requests: list[tuple[float, str, str]] = []
        self.instead: Instead | None = None
        self._draw = random.Random(seed)
        self._server: asyncio.Server | None = None

    @staticmethod
    def declines(order_id: str) -> bool:
        """Tell whether a charge of this order is declined: one of five is, whatever happens."""
        return random.Random(order_id).random() < 0.2

    @property
    def taken(self) -> int:
        """Charges that were made."""
        return sum(charge["status"] == "succeeded" for charge in self.charges.values())

    @property
    def ledger(self) -> list[dict[str, Any]]:
        """What it knows of each key: what was asked and became of it, whether it is void, whether a charge of it stands."""
        kept = [
            {
                **charge,
                "key": key,
                "voided": key in self.voided,
                "refused": charge["order_id"] in self.refused,
                "stands": charge["status"] == "succeeded"
                and key not in self.voided
                and f"refund-{charge['order_id']}" not in self.refunds,
            }
            for key, charge in self.charges.items()
        ]
        never = sorted(self.voided - self.charges.keys())
        return kept + [
            {"key": key, "order_id": key, "status": "declined", "voided": True, "refused": False, "stands": False}
            for key in never
        ]

    @property
    def standing(self) -> dict[str, int]:
        """Charges that were made and not given back: cents by order."""
        return {charge["order_id"]: charge["amount_cents"] for charge in self.ledger if charge["stands"]}

    async def __aenter__(self) -> Bank:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    @property
    def url(self) -> str:
        """Its address."""
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                if head[0].startswith("GET /ledger "):  # always as it is: the judge asks
                    text = orjson.dumps(self.ledger)
                    writer.write(HEAD.format(status=200, length=len(text), more="").encode() + text)
                    await writer.drain()
                    continue
                body = orjson.loads(await reader.readexactly(int(headers["content-length"])))
                if not await self._answer(writer, head[0].split()[1], headers["idempotency-key"], body):
                    await reader.read()  # until the other side closes
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, path: str, key: str, body: dict[str, Any]) -> bool:
        self.requests.append((time.monotonic(), path, key))
        self.in_flight += 1
        self.in_flight_most = max(self.in_flight_most, self.in_flight)
        await asyncio.sleep(self._draw.uniform(self.quickest_s, self.latency_s))
        said = None if self.instead is None else await self.instead(path, key, body)
        self.in_flight -= 1
        if said is not None:
            if said.status:
                head = HEAD.format(status=said.status, length=len(said.body), more=said.more)
                writer.write(head.encode() + said.body)
                await writer.drain()
            return bool(said.status)
        luck, after = self._draw.random(), self._draw.random() < 0.5
        fails, says_nothing = luck < self.failing, self.failing <= luck < self.failing + self.silent
        result = {} if (fails or says_nothing) and not after else self._do(path, key, body)
        if says_nothing:
            self.faults["silent"] += 1
            return False
        text = orjson.dumps(result)
        answer = HEAD.format(status=500 if fails else 200, length=len(text), more="").encode() + text
        self.faults["failed"] += fails
        writer.write(answer)
        if self._draw.random() < self.doubled:
            self.faults["doubled"] += 1
            await asyncio.sleep(self._draw.uniform(0, 0.01))
            writer.write(answer)
        await writer.drain()
        return True

    def _keeps(self, order_id: str) -> bool:
        """Tell whether it keeps the money that it has of an order."""
        has_it = order_id in self.charges and self.charges[order_id]["status"] == "succeeded"
        is_back = order_id in self.voided or f"refund-{order_id}" in self.refunds
        return has_it and not is_back and random.Random(f"keep {order_id}").random() < self.refusing

    def _do(self, path: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
        if path != "/charges" and self._keeps(body["order_id"]):
            self.refused.add(body["order_id"])
            return {"status": "refused", "order_id": body["order_id"]}
        if path == "/refunds":
            self.refunds[key] += 1
            return {"status": "succeeded", "order_id": body["order_id"]}
        if path == "/voids":
            self.voided.add(body["order_id"])
            return {"status": "succeeded", "order_id": body["order_id"]}
        self.asked[key] += 1
        if key in self.voided and key not in self.charges:
            return {"status": "declined", "order_id": body["order_id"]}
        status = "declined" if self.declines(key) and not self.lenient else "succeeded"
        known = self.charges.setdefault(key, {**body, "status": status, "charge_id": f"c-{key}"})
        if key in self.voided:
            return {"status": "declined", "order_id": known["order_id"]}
        return {name: known[name] for name in ("status", "charge_id", "order_id", "amount_cents")}
