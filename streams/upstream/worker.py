"""Faust's worker process."""

from __future__ import annotations

from aiokafka.errors import KafkaError
from faust.worker import Worker

from orderstream.errors import EngineUnavailable
from orderstream.streams.upstream.app import App


class QuietWorker(Worker):
    """Faust's worker, with our logging and without its banner.

    Faust sets up the root logger again and draws tables and a spinner into the output: faust-streaming/faust#711 would make
    ``override_logging`` an option of its command line, faust-streaming/faust#623 asks for plain logs.
    """

    def __init__(self, app: App) -> None:
        super().__init__(app, quiet=True, loglevel=None, redirect_stdouts=False)
        self.override_logging = False
        self.spinner = None  # it writes escapes to stdout, terminal or not, into the middle of JSON logs

    async def start(self) -> None:
        """Start, and run to the end.

        An app whose broker does not answer can't end by itself in Faust: robinhood/faust#711.  Here it is called.
        """
        try:
            await super().start()
        except EngineUnavailable as error:
            self.app.engine_unavailable(error)
        except KafkaError as error:
            self.app.kafka_unavailable(error)
