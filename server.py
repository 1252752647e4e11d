"""The API process: the application of ``api/`` with the settings, the records and the clouds of this installation.

    python server.py

SIGTERM ends it within seconds; kill -9 loses nothing that was accepted.
"""

from __future__ import annotations

import asyncio
import sys

import structlog
import uvicorn
import uvloop

from api.app import create_app
from clouds.offers import offers
from heliostat.errors import HeliostatError
from installation import open_installation
from runtime import telemetry
from runtime.settings import Settings

log = structlog.get_logger("api")


async def main() -> None:
    settings = Settings()
    telemetry.setup(settings, "heliostat-api")
    async with open_installation(settings) as installation:
        installation.bundles.keep()
        app = create_app(
            settings,
            buckets=installation.buckets,
            bundles=installation.bundles,
            keys=installation.keys,
            vendors=installation.vendors,
            offers=offers(settings.home),
        )
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                host=settings.api_host,
                port=settings.api_port,
                log_config=None,  # ours; and no access log: /metrics counts, and URLs are users' business
                access_log=False,
                # Long polls of nodes are cut after this; they come again, to whoever serves then.
                timeout_graceful_shutdown=5,
            )
        )
        await server.serve()
        if not server.started:
            raise SystemExit(2)  # uvicorn has logged why: the port is taken, or the records do not answer


if __name__ == "__main__":
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
    except HeliostatError as error:
        log.error("the API can't start", error=str(error))
        sys.exit(error.exit_code)
