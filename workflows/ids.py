"""Ids of everything that workflows create. Pure: the same arguments give the same id in every replay and every retry,
so a create that is repeated is the same create."""

from __future__ import annotations

import uuid

from heliostat.models.common import derived_id

_NAMESPACE = uuid.UUID("6f0c52be-6a3c-5b39-9d43-5f3b6c2f3a11")


def node_id(cluster_id: str, slot: int, generation: int) -> str:
    return derived_id("nd", cluster_id, slot, generation)


def launch_token(cluster_id: str, slot: int, generation: int) -> str:
    """Idempotency token of one machine. Neither the attempt nor the run id is part of it: they change over retries."""
    return str(uuid.uuid5(_NAMESPACE, f"{cluster_id}/{slot}/{generation}"))


def job_cluster_id(job_id: str, number: int) -> str:
    """Cluster number ``number`` (from 1) made for a job."""
    return derived_id("cl", job_id, number)


def run_id(job_id: str, number: int) -> str:
    """Ray's submission id of one run."""
    return f"{job_id}-{number}"


def event_id(resource_id: str, revision: int, index: int) -> str:
    """Ids of one resource's events sort in their order."""
    return f"ev_{resource_id}_{revision:08d}_{index:03d}"


def service_cluster_id(service_id: str, life: int, number: int) -> str:
    """Cluster number ``number`` (from 1) made for a service, whatever its version. ``life``: the records' revision with
    which the service was started; it differs each time that the service is started again."""
    return derived_id("cl", service_id, life, number)
