"""``python -m agent <boot file>``."""

from __future__ import annotations

import logging
import sys
import time

if sys.version_info < (3, 11):  # noqa: UP036 - a container image may have any; the imports below would fail unclearly
    print(  # noqa: T201
        f"heliostat: the agent needs Python 3.11 or later; {sys.executable} is {sys.version.split()[0]}. "
        "Use an image of Ray with a newer one (e.g. rayproject/ray:<version>-py311).",
        file=sys.stderr,
    )
    sys.exit(75)  # as the boot stub's own failures

from agent import boot as boots
from agent import init
from agent.node.life import Node


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m agent <boot file>", file=sys.stderr)  # noqa: T201
        return 2
    try:
        boot = boots.read(sys.argv[1])
        boot.make_dirs()
    except (OSError, KeyError, ValueError, TypeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        print(f"agent: the boot file {sys.argv[1]} can't be used: {what}", file=sys.stderr)  # noqa: T201
        return 2
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
        handlers=[logging.FileHandler(boot.node_dir / "agent.log"), logging.StreamHandler(sys.stderr)],
    )
    return init.run(boot, lambda: Node(boot).run())


if __name__ == "__main__":
    sys.exit(main())
