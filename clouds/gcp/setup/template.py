"""The Terraform file of ``cloud setup``: ``main.tf`` of this folder, with the permissions of
``clouds.gcp.setup.rights`` in it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from clouds.checklist import SERVE_PORTS
from clouds.gcp.setup import rights
from clouds.gcp.setup.verify_network import PROBES
from heliostat.models.clouds import Trust

FILE = Path(__file__).with_name("main.tf")
MAX_SLUG = 14
"""Letters: an account's id, ``heliostat-<slug>-node``, has 30 at most."""


def terraform(trust: Trust, *, project: str, region: str, name: str) -> str:
    """HCL for a person to read and apply. Its output ``cloud_yaml`` is what ``cloud register -f`` takes.

    Args:
        trust: whose tokens the project shall trust.
        project: its id.
        name: of the cloud.
    """
    optional = "compute.subnetworks.useExternalIp"
    values = {
        "PROJECT": project,
        "REGION": region,
        "NAME": name,
        "SLUG": slug(name),
        "ISSUER": trust.issuer,
        "SUBJECT": trust.subject,
        "MACHINES": _lines(permission for permission in rights.of_machines() if permission != optional),
        "BALANCERS": _lines(rights.of_balancers()),
        "LOOKS": _lines(rights.of_looks()),
        "SIGN": rights.SIGN,
        "ACT_AS": rights.ACT_AS,
        "OBJECTS": _listed([*rights.OBJECTS, rights.LOOK_AT_BUCKET]),
        "NODE_OBJECTS": _listed(rights.NODE_OBJECTS),
        "PROBES": _listed(PROBES),
        "SERVE_PORTS": _listed(map(str, SERVE_PORTS)),
    }
    return re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], FILE.read_text())


def slug(name: str) -> str:
    """A cloud's name as Google's names may be."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).lstrip("-0123456789")[:MAX_SLUG].strip("-")
    return plain if len(plain) > 1 else f"c{plain}0"


def _listed(values: Iterable[str]) -> str:
    return ", ".join(f'"{value}"' for value in values)


def _lines(values: Iterable[str]) -> str:
    return "\n".join(f'    "{value}",' for value in values)
