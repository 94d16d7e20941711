"""A worker's pages: ``/stats/`` for people, ``/stats/summary`` for programs, ``/metrics`` for Prometheus."""

from __future__ import annotations

import html
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY

from orderstream import __version__
from orderstream.exporter import Exporter, note_worker

_STOCK_ROWS_MAX = 200


def summary(app: Any) -> dict[str, Any]:
    """Return what this worker owns, how far it is, and the stock of its products."""
    consumer = app.consumer
    partitions = []
    for tp in sorted(consumer.assignment()):
        if tp.topic in app.tables.changelog_topics:
            continue
        end, read = consumer.highwater(tp), consumer._read_offset.get(tp)
        committed = consumer._committed_offset.get(tp)
        partitions.append(
            {
                "topic": tp.topic,
                "partition": tp.partition,
                "end": end,
                "read": read,
                "committed": committed,
                "lag": None if end is None else max(0, end - (committed or 0)),
            }
        )
    value = REGISTRY.get_sample_value
    return {
        "version": __version__,
        "owned": len(partitions),
        "lag": sum(p["lag"] or 0 for p in partitions),
        "orders": {
            "created": value("orders_created_total") or 0,
            "reserved": value("orders_reserved_total") or 0,
            "paid": value("orders_paid_total") or 0,
            "confirmed": value("orders_confirmed_total") or 0,
            "cancelled": {
                sample.labels["reason"]: sample.value
                for metric in REGISTRY.collect()
                if metric.name == "orders_cancelled"
                for sample in metric.samples
                if sample.name == "orders_cancelled_total"
            },
        },
        "open": app.pay.describe(),
        "charges_in_flight": len(app.pay.till),
        "away": sorted({*app.engines.away, *(["redis"] if app.engines.gate.is_away else [])}),
        "stock": {key: entry for key, _, entry in sorted(app.stock.entries())[:_STOCK_ROWS_MAX]},
        "partitions": partitions,
    }


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="refresh" content="2"><title>orderstream worker</title>
<style>:root{{color-scheme:light dark;font:15px/1.5 system-ui,sans-serif}}
body{{margin:2rem auto;max-width:60rem;padding:0 1rem}}
table{{border-collapse:collapse;margin:0 0 1.5rem}}td,th{{padding:.15rem .8rem .15rem 0;text-align:right}}
td:first-child,th:first-child{{text-align:left}}</style><h1>orderstream worker</h1>{body}"""


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    def cells(tag: str, row: tuple[Any, ...]) -> str:
        return "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', head)}</tr>{lines}</table>"


def page(told: dict[str, Any]) -> str:
    """Return the page for people."""
    orders = told["orders"]
    counted = [(name, f"{orders[name]:.0f}") for name in ("created", "reserved", "paid", "confirmed")]
    counted += [(f"cancelled: {reason}", f"{number:.0f}") for reason, number in sorted(orders["cancelled"].items())]
    away = f"<p><b>away: {html.escape(', '.join(told['away']))}</b></p>" if told["away"] else ""
    body = (
        away
        + f"<p>lag {told['lag']} records over {told['owned']} partitions; open orders {html.escape(str(told['open']))}; "
        + f"charges in flight {told['charges_in_flight']}</p>"
        + _table(("orders since the start", ""), counted)
        + _table(
            ("product", "available", "reserved", "sold"),
            [(key, row["available"], row["reserved"], row["sold"]) for key, row in told["stock"].items()],
        )
        + _table(
            ("topic", "partition", "end", "committed", "lag"),
            [(p["topic"], p["partition"], p["end"], p["committed"], p["lag"]) for p in told["partitions"]],
        )
    )
    return _PAGE.format(body=body)


def register(app: Any) -> None:
    """Add the pages to the app's web server."""

    @app.page("/stats/", name="stats:people")
    async def people(web: Any, request: Any) -> Any:
        return web.html(page(summary(app)))

    @app.page("/stats/summary", name="stats:summary")
    async def programs(web: Any, request: Any) -> Any:
        return web.json(summary(app))

    exporter = Exporter("worker", app.engines.store)

    @app.page("/metrics", name="stats:metrics")
    async def prometheus(web: Any, request: Any) -> Any:
        note_worker(app, app.engines.settings)
        return web.bytes(await exporter.scrape(), content_type=CONTENT_TYPE_LATEST.split(";")[0])
