"""``python -m api.openapi``: writes ``api/openapi.json``, which is committed and tested to be up to date."""

from __future__ import annotations

import json
from pathlib import Path

from api.app import create_app
from runtime.keys import Keys
from runtime.settings import Settings

FILE = Path(__file__).with_name("openapi.json")


def render() -> str:
    app = create_app(Settings(), buckets={}, keys=Keys(bytes(32)))
    return json.dumps(app.openapi(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(render())
