"""``python -m clouds.local list|end``: this installation's living machines and load balancers on this host, one id a
line; ``end`` cuts the machines' power, ends the load balancers, and returns when they are gone. For when the control
plane cannot."""

from __future__ import annotations

import sys
import time

from clouds.contract.machines import MachineState
from clouds.local.balancer.traefik import LocalBalancer
from clouds.local.machines.processes import LocalMachines
from runtime.keys import load_or_create
from runtime.settings import Settings

END_S = 60.0


def main(argv: list[str]) -> int:
    if argv not in (["list"], ["end"]):
        sys.stderr.write(f"{__doc__}\n")
        return 1
    settings = Settings()
    # Isolation matters to launches only, where to listen to endpoints that are made.
    machines, balancer = LocalMachines(settings.home, "process", sys.executable), LocalBalancer(settings.home)
    installation_id = load_or_create(settings.home, settings.secret_key).installation_id()
    ids = [machine.machine_id for machine in machines.list_owned(installation_id)]
    services = balancer.list_owned(installation_id)
    if argv == ["end"]:
        deadline = time.monotonic() + END_S
        for service_id in services:
            balancer.remove(service_id)
        machines.terminate(ids)
        while left := [m.machine_id for m in machines.describe(ids) if m.state is not MachineState.GONE]:
            if time.monotonic() > deadline:
                sys.stderr.write(f"still running after {END_S:.0f} s: {' '.join(left)}\n")
                return 2
            time.sleep(0.05)
    sys.stdout.writelines(f"{one}\n" for one in [*ids, *services])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
