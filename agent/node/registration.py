"""How a node joins its cluster: it registers at the control plane, and a worker finds its head."""

from __future__ import annotations

import logging
import platform
import socket
import time
from typing import Any

from agent.channel import Backoff, Gone, Refused, Unavailable
from agent.constants import PROTOCOL
from agent.context import Context, Shutdown
from agent.ray_node.process import accepts, installed_version

log = logging.getLogger("agent.node.registration")
FINAL = (400, 401, 403, 409, 422)
"""Answers to ``register`` that no repetition changes."""


def register(context: Context) -> dict[str, Any]:
    """The node's config. Raises Shutdown."""
    boot, channel = context.boot, context.channel
    body = {
        "protocol": PROTOCOL, "node_id": boot.node_id, "generation": boot.generation,
        "bootstrap_token": boot.bootstrap_token, "ip": boot.ip, "hostname": socket.gethostname(),
        "boot_id": context.boot_id, "ray_version": installed_version(), "python_version": platform.python_version(),
    }  # fmt: skip
    backoff = Backoff(boot.constants.backoff_base_s, boot.constants.backoff_cap_s)
    deadline = time.monotonic() + boot.constants.register_timeout_s
    while True:
        try:
            config: dict[str, Any] = channel.call("POST", "/register", body)
        except Gone as error:
            raise Shutdown(f"the control plane has ended this node: {error}", graceful=False) from None
        except (Unavailable, Refused) as error:
            if isinstance(error, Refused) and error.status in FINAL:
                raise Shutdown(f"registration refused: {error}", graceful=False) from None
            if time.monotonic() > deadline:
                timeout_s = boot.constants.register_timeout_s
                raise Shutdown(f"no registration within {timeout_s:.0f} s: {error}") from None
            wait = backoff.next()
            log.warning("registration failed, next attempt in %.1f s: %s", wait, error)
            context.sleep(wait)
        else:
            channel.token = config["node_token"]
            channel.last_contact = time.monotonic()
            log.info("registered as %s %s of %s (%s)", config["role"], boot.node_id, config["cluster_id"], boot.ip)
            return config


def register_again(context: Context) -> None:
    """After the API no longer accepts the node's token (its records were restored, for example): the same process may
    have another one."""
    token, context.channel.token = context.channel.token, ""
    try:
        register(context)
    except Shutdown as shutdown:
        context.channel.token = token
        log.warning("%s", shutdown.reason)  # if it stays so, the dead-man switch ends this node


def head_address(context: Context) -> str:
    """Waits for the head's address and for its GCS to listen there; both machines boot meanwhile. Raises Shutdown."""
    constants = context.boot.constants
    backoff = Backoff(constants.backoff_base_s, constants.backoff_cap_s)
    # The control plane decides how long the head's machine may boot, and ends this node with the cluster.
    deadline = time.monotonic() + constants.register_timeout_s
    address = ""
    while True:
        try:
            known = address
            address = str(context.channel.call("GET", "/head?wait=5", timeout_s=20)["gcs_address"])
            if not known:
                deadline = time.monotonic() + constants.head_ready_timeout_s
        except Gone as error:
            raise Shutdown(f"the control plane has ended this node: {error}", graceful=False) from None
        except Unavailable:
            context.sleep(backoff.next())
        except Refused as error:
            if error.status != 404:
                context.sleep(backoff.next())
        answered_at = time.monotonic()
        while address and time.monotonic() - answered_at < 20:  # then ask again: the head may have been replaced
            if accepts(address):
                return address
            context.sleep(constants.ready_poll_s)
        if time.monotonic() > deadline:
            where = f"its GCS at {address} does not listen" if address else "it has not reported its address"
            raise Shutdown(f"the cluster's head is not up: {where}", "node_failed")
        context.sleep(0)
