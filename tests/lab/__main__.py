"""``python -m tests.lab [--] COMMAND …``: runs a command in the lab, a network, mount and PID namespace of its own.

There is no route out of it, and nothing of it outlives this process, however that ends. Needs root. E.g.

    python -m tests.lab pytest -p no:xdist tests/e2e/test_lab_aws.py     # as make test-long does by itself
    python -m tests.lab python -m tests.lab.by_hand                      # a control plane, both vendors, and a prompt
"""

from __future__ import annotations

import sys

from tests.lab import namespaces


def main(arguments: list[str]) -> int:
    if arguments[:1] == [namespaces.INSIDE]:
        return namespaces.first_process(arguments[1:])
    command = arguments[1:] if arguments[:1] == ["--"] else arguments
    missing = namespaces.missing()
    if not command or command[0] in ("-h", "--help"):
        print(__doc__)
        print(f"It can't run here: {missing}." if missing else "It can run here.")
        return 2
    if missing:
        print(f"error: the lab can't run here: {missing}", file=sys.stderr)
        return 2
    return namespaces.enter(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
