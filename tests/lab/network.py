"""The lab's network: one bridge as the VPC's router, a cable for each host, and what may be wrong with a cable."""

from __future__ import annotations

import socket
import subprocess

GATEWAY = "10.77.0.1"
"""The lab's own end: API, vendors' endpoints."""
PREFIX = 16
METADATA = "169.254.169.254"
_BRIDGE = "br0"

_IPV4_ONLY = [(40, 0, 0, 12), (21, 0, None, 0x0800)]  # ldh [12]; jeq #ETH_P_IP, next, pass
_DROP, _PASS = (6, 0, 0, 2), (6, 0, 0, 0)  # TC_ACT_SHOT, TC_ACT_OK
_RANDOM = 2**32 - 0x1000 + 56  # SKF_AD_OFF + SKF_AD_RANDOM


def build() -> None:
    _ip(
        f"link add {_BRIDGE} type bridge",
        f"addr add {GATEWAY}/{PREFIX} dev {_BRIDGE}",
        f"addr add {METADATA}/32 dev {_BRIDGE}",
        f"link set {_BRIDGE} up",
    )


def add_address(address: str) -> None:
    """Another one of the lab's own end, e.g. a load balancer's."""
    _ip(f"addr add {address}/32 dev {_BRIDGE}")


def plug(cable: str, pid: int, address: str) -> None:
    """Connects the network namespace of that process."""
    _ip(f"link add {cable} type veth peer name eth0 netns {pid}", f"link set {cable} master {_BRIDGE} up")
    _run(
        ["nsenter", "-t", str(pid), "-n", "ip", "-batch", "-"],
        f"link set lo up\naddr add {address}/{PREFIX} dev eth0\nlink set eth0 up\nroute add default via {GATEWAY}\n",
    )


def unplug(cable: str) -> None:
    """The kernel takes a cable away with its namespace, but a second later."""
    subprocess.run(["ip", "link", "del", cable], capture_output=True, check=False)


def cables() -> list[str]:
    """Of hosts that are there."""
    shown = _run(["ip", "-o", "link", "show", "type", "veth"])
    return [line.split(": ")[1].partition("@")[0] for line in shown.splitlines()]


def connect(cable: str, connected: bool) -> None:
    """False: nothing reaches the host nor comes from it; it lives on."""
    _ip(f"link set {cable} master {_BRIDGE}" if connected else f"link set {cable} nomaster")


def impair(cable: str, *, loss: float = 0.0, without: str = "") -> None:
    """Drops a share (0 to 1) of the IPv4 packets in both directions, and all from and to the address ``without``.
    Neither: heals. By classic BPF, as netem and iptables are not everywhere (https://docs.kernel.org/networking/filter.html).
    """
    subprocess.run(["tc", "qdisc", "del", "dev", cable, "clsact"], capture_output=True, check=False)
    if not loss and not without:
        return
    _run(["tc", "qdisc", "add", "dev", cable, "clsact"])
    # What the cable's end in the lab sends is what the host gets, so there the other one is the source.
    for direction, offset in (("ingress", 30), ("egress", 26)):
        code = _program(loss, without, offset)
        _run(["tc", "filter", "add", "dev", cable, direction, "bpf", "da", "bytecode", code])


def _program(loss: float, without: str, offset: int) -> str:
    program: list[tuple[int, int, int | None, int]] = list(_IPV4_ONLY)
    if without:
        number = int.from_bytes(socket.inet_aton(without), "big")
        program += [(32, 0, 0, offset), (21, 0, 1, number), _DROP]  # ld [offset]; jeq #number, next, over; drop
    if loss:
        program += [(32, 0, 0, _RANDOM), (53, 1, 0, min(2**32 - 1, int(loss * 2**32))), _DROP]  # jge: spared
    program.append(_PASS)
    end = len(program) - 1
    filled = [(code, jt, end - at - 1 if jf is None else jf, k) for at, (code, jt, jf, k) in enumerate(program)]
    return ",".join([str(len(filled)), *(f"{code} {jt} {jf} {k}" for code, jt, jf, k in filled)])


def _ip(*lines: str) -> None:
    _run(["ip", "-batch", "-"], "\n".join(lines) + "\n")


def _run(command: list[str], given: str = "") -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}\n{given}")
    return done.stdout
