"""``python -m tests.lab python -m tests.lab.by_hand``: the lab with a control plane and both vendors' clouds.

Opens a Python in which ``lab``, ``site``, ``hosts()`` and ``shell()`` are there, e.g.

    >>> shell()                              # then: heliostat job submit --cloud aws -- python -c "print(1)"; exit
    >>> hosts()[0].partition()               # .heal(), .lose_packets(0.2), .limit_memory(2**30), .console()
    >>> lab.aws.spot_notice(hosts()[0])      # .rebalance(host), .no_capacity(times=3), .throttle("RunInstances")
    >>> lab.gcp.preempt(hosts()[0])          # .no_capacity(zone="us-central1-a"), .lose_answer("insert"), .heal()

With its end all is gone.
"""

from __future__ import annotations

import code
import os
import subprocess

from tests.e2e.support import Stack
from tests.lab.lab import Lab
from tests.lab.namespaces import ROOM
from tests.lab.site import Site


def main() -> None:
    lab = Lab()
    stack = Stack(ROOM / "home", Site.settings(lab))
    try:
        stack.up()
        site = Site(lab, stack)
        site.register_aws("aws")
        site.register_gcp("gcp")

        def shell() -> None:
            """A shell beside the control plane; the CLI finds it."""
            subprocess.run([os.environ.get("SHELL", "bash")], env=stack.env, check=False)

        code.interact(__doc__, local={"lab": lab, "site": site, "hosts": lab.hosts, "shell": shell}, exitmsg="")
    finally:
        stack.dispose()
        lab.close()


if __name__ == "__main__":
    main()
