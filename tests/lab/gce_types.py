"""The machine types of the Google Cloud fake: those of the catalogue that ships, in Google's own form, and a small
one."""

from __future__ import annotations

from typing import Any

from clouds.gcp.machines import catalogue


def listed() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": "e2-micro", "guestCpus": 2, "memoryMb": 1024, "isSharedCpu": True, "architecture": "X86_64"}
    ]
    for t in catalogue.shipped().types.values():
        if "/" in t.name:
            continue
        item = {
            "name": t.name,
            "guestCpus": t.cpu,
            "memoryMb": t.memory // 2**20,
            "isSharedCpu": False,
            "architecture": "ARM64" if t.architecture == "arm64" else "X86_64",
        }
        if t.gpu:
            item["accelerators"] = [{"guestAcceleratorType": t.accelerator, "guestAcceleratorCount": t.gpu}]
        found.append(item)
    return found
