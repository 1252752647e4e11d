"""What becomes of the machines, runs and versions of a test's world: the knobs that a test turns."""

from __future__ import annotations

from dataclasses import dataclass

from heliostat.models.agents import CommandKind


@dataclass
class NodePlan:
    """What becomes of a machine."""

    register: bool = True
    ready: bool = True
    failed: str = ""
    """Its agent tells that Ray can't start, for this reason."""


@dataclass
class RunPlan:
    """What becomes of a run that is given to a head."""

    exit_code: int = 0
    error: str = ""
    """As in ``RUN_ENDED``; else ``entrypoint`` when the exit code is not 0."""
    hold: bool = False
    """Goes on until it is stopped or :meth:`FakeAgent.end_run` ends it."""
    timed_out: bool = False
    refuse: str = ""
    """The head does not take it, for this reason."""
    retryable: bool = False
    silent: bool = False
    """The head never answers to the command; the run does not begin."""
    answer: bool = True
    """False: the run begins and ends before the command is answered, and the answer never comes."""


@dataclass
class ServePlan:
    """What becomes of one version of a service, wherever it is deployed. May be changed at any time; what is there
    already changes by :meth:`tests.workflows.serving.FakeServe.become`."""

    healthy: bool = True
    """False: its applications are being deployed for ever."""
    healthy_after_s: float = 0
    """Real seconds from the deploy."""
    failed: str = ""
    """Serve gives the deploy up (DEPLOY_FAILED) with these words."""
    refuse: str = ""
    """The head does not take the deploy, for this reason."""
    retryable: bool = False
    """Of ``refuse``: once, then it does."""
    probe: str = ""
    """Probes fail with these words."""
    silent: frozenset[CommandKind] = frozenset()
    """Commands that are never answered."""
    ongoing: int = 0
    """Requests that do not end while it is drained."""
    sick_in_traffic: str = ""
    """Serve says UNHEALTHY with these words once it has had a request."""
    error_share: float = 0
    """Of its answers; the others are good."""
    latency_ms: float = 20
    hang: bool = False
    """Requests get no answer. They are said to be a minute old at once, for tests have no minute."""
