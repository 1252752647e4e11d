"""``python -m store.migrate``: brings the records to this code's schema. Settings from the environment."""

from __future__ import annotations

import asyncio

from runtime.settings import Settings
from store.database import latest_revision, migrate


def main() -> None:
    settings = Settings()
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    asyncio.run(migrate(settings.records_url))
    print(f"records are at schema {latest_revision()}")  # noqa: T201  the command's answer


if __name__ == "__main__":
    main()
