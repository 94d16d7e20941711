"""A Faust app with one agent on our batch helper: it writes down each record it has done, and fails within a batch.

    python late_ack_app.py BROKER TOPIC GROUP OUT FAIL_AT late|early

``FAIL_AT``: the batch, counted from 1, in the middle of which the agent raises; 0 never.  ``early`` acknowledges each batch
before its body has run, as Faust's own take() may: to show that the test notices.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from orderstream.agents.batches import Batch, batches
from orderstream.agents.stage import agent_body
from orderstream.streams.upstream.app import App
from orderstream.streams.upstream.worker import QuietWorker


def main(broker: str, topic: str, group: str, out: Path, fail_at: int, mode: str) -> None:
    """Run until killed."""
    app = App(
        group,
        broker=f"kafka://{broker}",
        store="memory://",
        datadir=out.parent / "data",
        topic_partitions=4,
        topic_disable_leader=True,
        broker_commit_interval=0.1,
        broker_session_timeout=2,
        broker_heartbeat_interval=0.5,
        web_enabled=False,
    )
    records = app.topic(topic, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")

    @agent_body
    async def work(stream: Any) -> None:
        number = 0
        async for batch in batches(app, stream, records_max=200, interval_s=0.01):
            number += 1
            if mode == "early":
                acknowledge(batch)
            done = []
            for chunk in batch.chunks:
                for record in chunk.records:
                    done.append(f"{record.partition}/{record.offset}\n")
            await asyncio.sleep(0.3)  # the commit timer of 0.1 s runs meanwhile
            if number == fail_at:
                raise RuntimeError("in the middle of a batch")
            with out.open("a") as file:
                file.writelines(done)

    def acknowledge(batch: Batch) -> None:
        for chunk in batch.chunks:
            app.consumer.ack_chunk(chunk)

    app.agent(records, name="work")(work)
    QuietWorker(app).execute_from_commandline()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
