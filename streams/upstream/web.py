"""Faust's web server and router: a socket that is bound already, and which worker has a partition."""

from __future__ import annotations

from aiohttp.web import AppRunner, BaseSite, SockSite
from faust.app.router import Router as FaustRouter
from faust.types import TP
from faust.web.drivers import aiohttp as driver
from yarl import URL


class Web(driver.Web):
    """Faust's web server, on the app's ``web_socket`` where it has one.

    Faust binds the port itself, long after it was found to be free; another process may have it by then.  No upstream issue
    found.
    """

    def serve_by(self, runner: AppRunner) -> None:
        """Serve by a runner with bounds, before the server starts; Faust's own takes connections until none can be had."""
        self._runner = runner

    def _new_transport_tcp(self) -> BaseSite:
        taken = self.app.web_socket
        return SockSite(self._runner, taken) if taken is not None else super()._new_transport_tcp()


class Router(FaustRouter):
    """Faust's router, asked by partition.

    Faust's own ``key_store`` finds the partition by the hash of the key as its changelog writes it.  Table routes that do
    not find their owner: robinhood/faust#180, faust-streaming/faust#514.
    """

    def owner(self, table_name: str, partition: int) -> URL:
        """Return the URL of the worker that has this partition of a table.

        Raises:
            KeyError: no worker has it now.
        """
        topic = self._get_table_topic(self.app.tables[table_name])
        return URL(self._assignor._tps_url[TP(topic, partition)])

    def owners(self) -> dict[TP, str]:
        """Return the URL of the worker of each partition of the agents' topics."""
        return dict(self._assignor._external_tps_url)

    def is_self(self, url: URL) -> bool:
        """Return whether a worker's URL is this one's."""
        return bool(self._urlident(url) == self._urlident(self.app.conf.canonical_url))
