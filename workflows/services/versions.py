"""ServiceWorkflow, second part: the clusters of its versions, what Serve on them is given, the endpoint before them.

``_tend`` compares what each cluster should be doing with what it does and starts what is missing, one task a cluster at
a time. Each step is guarded by the slot's state, so that a lost answer, a replaced head or continue-as-new repeats
nothing that was done: a cluster's id is fixed before it is asked for, a deploy's command id before it is given.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NoReturn

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError, FailureError

with workflow.unsafe.imports_passed_through():
    from activities.endpoints import EndpointActivities, EndpointRef, EnsureEndpoint, SetBackends
    from activities.leases import AcquireLease, LeaseActivities, MadeCluster, ReleaseLease
    from clouds.contract.balancer import Endpoint
    from heliostat.models.agents import CommandKind, ServeStatus
    from heliostat.models.clusters import Cluster, ClusterState
    from heliostat.models.common import EventLevel
    from heliostat.models.services import ServiceState, ServiceVersionState
    from runtime.messages.clusters import ClusterInput, LeaseAnswer, Release
    from workflows import ids, policies
    from workflows.services.progress import CommandOff, ServiceBase, TryAgain
    from workflows.services.state import LIVING, Slot, VersionData
HOPELESS = ("bad_config", "denied")
"""Ends of a cluster after which another one would end the same way."""
NOTICES = "notices"
"""Patch: a service acts on what the cloud announces for its heads' machines."""
GATES = "its proxies go by the tokens of now"
"""Patch: before a cluster has traffic. They were changed while it was probed."""
UNSURE = "unsure"
"""Patch: a load balancer that failed over its backends is told what it should have, also if that is what it had."""
UNHEALTHY = ServiceVersionState.UNHEALTHY
ENDING = (ClusterState.TERMINATING, ClusterState.TERMINATED, ClusterState.FAILED)


class ServiceClusters(ServiceBase):
    # --- what clusters and heads say ----------------------------------------------------------------------

    def _hear(self, said: LeaseAnswer) -> None:
        """Takes what a cluster said, unless it is older than what is known."""
        found = self.s.slot_of(said.cluster_id)
        if found is None or (said.revision < found[1].revision and not said.state.settled):
            return
        version, slot = found
        was_ready = slot.ready
        if said.notice != slot.notice:
            slot.notice = said.notice
            if said.notice and workflow.patched(NOTICES):
                text = f"{version.spec.name}: cluster {slot.number} ({slot.cluster_id}): {said.notice}"
                self._event("head_notice", text, level=EventLevel.WARNING)
        slot.revision, slot.state, slot.reason, slot.ready = said.revision, said.state, said.reason, said.ready
        if said.head_node_id != slot.head_node_id and (said.ready or said.head_node_id is None):
            if slot.head_node_id is not None:
                slot.lose_head()
            slot.head_node_id = said.head_node_id
        if said.ready:
            slot.failures, slot.not_before = 0, None
        elif was_ready:
            self._event(
                "cluster_lost",
                f"{version.spec.name}: cluster {slot.number} ({slot.cluster_id}) {said.state}: {said.reason}",
                level=EventLevel.WARNING,
            )
        if said.state in ENDING and version.state in LIVING:
            self._cluster_ended(version, slot, said)
        self._touch(version)

    def _cluster_ended(self, version: VersionData, slot: Slot, said: LeaseAnswer) -> None:
        """Another one takes its slot, with back-off; a config that no cluster can have is the version's end."""
        slot.failures += 1
        hopeless = said.cause in HOPELESS
        reason = f"cluster {said.cluster_id} ended: {said.reason}"
        slot.lose_cluster()
        slot.reason = reason
        wait = policies.backoff(slot.failures - 1)
        slot.not_before = workflow.now() + wait if wait else None
        if hopeless:
            slot.failed, slot.message = True, reason

    def _take_status(self, cluster_id: str, status: ServeStatus) -> None:
        """Serve's word on a head; what it says of an earlier deploy is passed over."""
        found = self.s.slot_of(cluster_id)
        if found is None:
            return
        version, slot = found
        if not slot.deploy_id or status.deploy != slot.deploy_id:
            return
        if slot.healthy and not status.healthy:
            self._event(
                "serve_unhealthy",
                f"{version.spec.name} on cluster {slot.number}: {status.message or 'Serve calls it unhealthy'}",
                level=EventLevel.WARNING,
            )
        slot.healthy, slot.failed, slot.message = status.healthy, status.failed, status.message
        slot.http, slot.grpc = status.http or slot.http, status.grpc or slot.grpc
        self._touch(version)

    # --- the endpoint -------------------------------------------------------------------------------------

    def _tend_endpoint(self) -> None:
        if not self.s.url or self.s.endpoint_lost:
            if self.s.versions:  # not for a deploy that may have been taken back
                self._start("endpoint", self._ensure_endpoint)
        elif not self.s.told_backends():
            self._start("backends", self._set_backends)

    async def _ensure_endpoint(self) -> None:
        """Also of one that was lost, which is told its backends afterwards. Undo: ``_remove_endpoint``."""
        request = EnsureEndpoint(
            cloud_id=self.input.cloud_id,
            service_id=self.input.service_id,
            service_name=self.input.name,
            grpc=any(v.spec.grpc for v in self.s.versions.values()),
        )
        try:
            endpoint: Endpoint = await workflow.execute_activity_method(
                EndpointActivities.ensure_endpoint, request, summary="make the endpoint", **policies.ENDPOINT
            )
        except ActivityError as error:
            if isinstance(error.cause, ApplicationError) and error.cause.type == "backends_lost":
                await self._set_backends()  # it is there, and shows itself when it knows what it should have
                return
            self._endpoint_failed("the endpoint could not be made", error)
        if self.s.endpoint_lost:
            self.s.endpoint_lost, self.s.backends = False, []
        self.s.url, self._endpoint_trouble = endpoint.url, ""
        self._event("endpoint", f"endpoint {endpoint.url}")

    async def _set_backends(self) -> None:
        wanted = self.s.wanted_backends()
        self.s.backends_revision += 1
        request = SetBackends(
            cloud_id=self.input.cloud_id,
            service_id=self.input.service_id,
            revision=self.s.backends_revision,
            backends=wanted,
        )
        names = {v.spec.id: v.spec.name for v in self.s.versions.values()}
        weights = {names.get(b.version_id, b.version_id): b.weight for b in wanted}
        summary = ", ".join(f"{name} {weight} %" for name, weight in weights.items()) or "no backends"
        try:
            await workflow.execute_activity_method(
                EndpointActivities.set_backends, request, summary=f"weights: {summary}"[:200], **policies.ENDPOINT
            )
        except ActivityError as error:
            cause = error.cause if isinstance(error.cause, ApplicationError) else None
            if cause is not None and cause.type == "gone":
                # Somebody has removed it, and all that it was told; a service that ends has nothing left to take out.
                self.s.endpoint_lost, self.s.backends = True, []
                return
            if cause is not None and cause.type == "outdated" and cause.details:
                self.s.backends_revision = max(self.s.backends_revision, int(cause.details[0]))
                return
            if workflow.patched(UNSURE):
                self.s.backends_unsure = True
                given = {backend.version_id for backend in wanted if backend.weight}
                for version in self.s.versions.values():
                    version.had_traffic = version.had_traffic or version.spec.id in given
            self._endpoint_failed("the endpoint could not be told its backends", error)
        before = {b.version_id: b.weight for b in self.s.backends if b.weight}
        after = {b.version_id: b.weight for b in wanted if b.weight}
        self.s.backends, self.s.backends_unsure = wanted, False
        self.s.endpoint_lost, self._endpoint_trouble = False, ""
        for version in self.s.versions.values():
            share = after.get(version.spec.id, 0)
            version.had_traffic = version.had_traffic or share > 0
            if share != before.get(version.spec.id, 0):
                self._event("weight", f"{version.spec.name}: {share} % of the traffic")
            if version.state in LIVING or share != before.get(version.spec.id, 0):
                self._check(version, "Weight", share > 0, "Share", f"{share} % of the traffic")
            self._touch(version)

    def _endpoint_failed(self, what: str, error: ActivityError) -> NoReturn:
        why = getattr(error.cause, "message", None) or error.cause or error
        self._event("endpoint_failed", f"{what}: {why}", level=EventLevel.ERROR)
        self._endpoint_trouble = f"the load balancer: {what}: {why}"
        raise TryAgain

    async def _remove_endpoint(self) -> None:
        await workflow.execute_activity_method(
            EndpointActivities.remove_endpoint,
            EndpointRef(cloud_id=self.input.cloud_id, service_id=self.input.service_id),
            summary="remove the endpoint",
            **policies.REMOVE_ENDPOINT,
        )
        self.s.url, self.s.backends = "", []
        self._dirty = True

    # --- clusters and Serve on them -----------------------------------------------------------------------

    def _tend(self, now: datetime) -> None:
        for version in self.s.versions.values():
            for slot in version.tended:
                if version.state in LIVING:
                    self._tend_slot(version, slot, now)
                elif version.state == UNHEALTHY and slot.ready and slot.taken and slot.gate != self.s.gate_key:
                    # It is kept, and can be reached for inspection: a token that was deleted opens it no more.
                    self._start(f"tokens of {task_of(version, slot)}", partial(self._set_gate, version, slot))
            if version.state in LIVING:
                self._tell_checklist(version)

    def _tend_slot(self, version: VersionData, slot: Slot, now: datetime) -> None:
        name = task_of(version, slot)
        if slot.open and slot.gate not in (self.s.gate_key, "draining"):  # whatever else it is busy with
            self._start(f"tokens of {name}", partial(self._set_gate, version, slot))
        if slot.failed and version.state == ServiceVersionState.RUNNING:
            # It served once: what failed it now (a package, a node) may pass.
            if slot.not_before is None:
                slot.not_before = now + policies.FAILED_AGAIN
            elif slot.not_before <= now:
                slot.not_before, slot.given, slot.failed = None, "", False
        if not slot.made:
            if slot.not_before is None or slot.not_before <= now:
                self._start(name, lambda: self._make_cluster(version, slot))
        elif not slot.ready:
            if slot.asked_at is not None and now - slot.asked_at >= policies.LEASE_RECHECK:
                self._start(name, lambda: self._ask_cluster(slot))
        elif slot.given != slot.wanted(version.spec.id, version.capacity) or not slot.taken:
            if not slot.failed or slot.given != slot.wanted(version.spec.id, version.capacity):
                self._start(name, lambda: self._deploy(version, slot))
        elif slot.gate != self.s.gate_key:
            self._start(f"tokens of {name}", partial(self._set_gate, version, slot))
        elif slot.healthy and slot.probed != slot.given and any(b.id == slot.cluster_id for b in self.s.backends):
            if slot.probed_here(version.spec.id) or not (version.spec.probes or version.spec.grpc):
                self._found_fit(version, slot)  # another capacity of what was probed, or nothing that can be reached
            else:
                self._start(name, lambda: self._probe(version, slot))

    async def _make_cluster(self, version: VersionData, slot: Slot) -> None:
        """An ordinary cluster with the service's lease on it from the start. Undo: ``_release``."""
        if not slot.cluster_id:
            self.s.clusters_made += 1
            slot.cluster_id = ids.service_cluster_id(self.input.service_id, self.input.revision, self.s.clusters_made)
        now = workflow.now()
        name = f"{self.input.name[:40]}-{slot.cluster_id[-8:]}"  # never that of a cluster which still ends
        common: dict[str, Any] = {
            "name": name,
            "project": self.input.project,
            "cloud": self.input.cloud,
            "created_by": version.spec.created_by,
            "created_at": now,
            "tags": version.spec.tags,
        }
        request = ClusterInput(
            cluster_id=slot.cluster_id,
            project_id=self.input.project_id,
            cloud_id=self.input.cloud_id,
            config=version.spec.compute_config,
            service_id=self.input.service_id,
            limits=version.spec.limits or self.input.limits,
            **common,
        )
        cluster = Cluster(
            id=slot.cluster_id,
            state=ClusterState.STARTING,
            reason="asked for by its service",
            compute_config=version.spec.compute_config,
            state_since=now,
            **common,
        )
        slot.made, slot.asked_at = True, now  # from here on there may be something to end
        self._touch(version)
        try:
            await workflow.execute_activity_method(
                LeaseActivities.start_service_cluster,
                MadeCluster(cluster=cluster, input=request),
                summary=f"start cluster {slot.number} of {version.spec.name}",
                **policies.MESSAGE,
            )
        except ActivityError:
            slot.made = False  # the next try makes the same one, with the same id
            slot.failures += 1
            slot.not_before = workflow.now() + policies.backoff(slot.failures)
            raise

    async def _ask_cluster(self, slot: Slot) -> None:
        """It has been silent for long: its workflow may have been ended by hand."""
        slot.asked_at = workflow.now()
        answer: LeaseAnswer = await workflow.execute_activity_method(
            LeaseActivities.acquire_lease,
            AcquireLease(cluster_id=slot.cluster_id, holder=self.input.service_id),
            summary=f"ask cluster {slot.cluster_id}",
            **policies.LEASE,
        )
        self._hear(answer)

    async def _deploy(self, version: VersionData, slot: Slot) -> None:
        """Gives Serve on this head the version's config; what becomes of it is told by facts."""
        wanted = slot.wanted(version.spec.id, version.capacity)
        if slot.given != wanted or not slot.deploy_id:
            slot.given, slot.deploy_id = wanted, self._command_id(CommandKind.SERVE_DEPLOY)
            slot.taken = slot.healthy = slot.failed = False
            slot.message = ""
        args: dict[str, Any] = {
            "service_id": self.input.service_id,
            "version_id": version.spec.id,
            "deploy": slot.deploy_id,
            "target_capacity": version.capacity,
            "gate": self.s.gate.model_dump(mode="json"),
        }
        gate = self.s.gate_key
        try:
            answer = await self._command(
                slot,
                CommandKind.SERVE_DEPLOY,
                args,
                policies.DEPLOY_TIMEOUT,
                until=lambda: slot.given != wanted or version.state not in LIVING,
                id=slot.deploy_id,
            )
        except ActivityError as error:
            slot.failed = True
            slot.message = f"Serve did not take it: {getattr(error.cause, 'message', None) or error.cause or error}"
            self._touch(version)
            return
        slot.taken, slot.gate = True, gate
        slot.http, slot.grpc = str(answer.get("http") or ""), str(answer.get("grpc") or "")
        self._touch(version)

    async def _set_gate(self, version: VersionData, slot: Slot) -> None:
        """New tokens, or the end of a drain that was taken back."""
        gate = self.s.gate_key
        await self._command(
            slot,
            CommandKind.SERVE_GATE,
            {"gate": self.s.gate.model_dump(mode="json"), "draining": False},
            policies.GATE_TIMEOUT,
            until=lambda: version.state == ServiceVersionState.TERMINATING,
        )
        slot.gate = gate
        self._touch(version)

    async def _probe(self, version: VersionData, slot: Slot) -> None:
        """Real requests through the endpoint, on the path of the traffic; until they are answered as expected, or for
        as long as one command may take. The version's own deadline ends the tries."""
        given = slot.given
        probes: list[dict[str, Any]] = [
            {"application": name, **probe.model_dump(mode="json")} for name, probe in version.spec.probes.items()
        ]
        if version.spec.grpc:
            probes.append({"application": "gRPC", "grpc": True, "timeout_s": policies.GRPC_PROBE_S})
        args: dict[str, Any] = {
            "url": self.s.url,
            "cluster_id": slot.cluster_id,
            "version_id": version.spec.id,
            "give_up_s": policies.PROBE_TIMEOUT.total_seconds(),
            "probes": probes,
        }
        answer = await self._command(
            slot,
            CommandKind.SERVE_PROBE,
            args,
            policies.PROBE_TIMEOUT + policies.PROBE_ANSWER,
            until=lambda: slot.given != given or slot.failed or version.state not in LIVING,
        )
        if answer.get("healthy") and slot.given == given:
            self._found_fit(version, slot)
        else:
            slot.message = str(answer.get("message") or "its requests were not answered as expected")
            self._touch(version)
            raise TryAgain

    def _found_fit(self, version: VersionData, slot: Slot) -> None:
        if not slot.probed:
            self._event("fit", f"{version.spec.name}: cluster {slot.number} answers real requests")
        slot.probed, slot.open_on, slot.message = slot.given, slot.head_node_id, ""
        self._touch(version)

    def _tell_checklist(self, version: VersionData) -> None:
        """How far it is, for people; each line says what it waits for."""
        total = len(version.slots)

        def line(kind: str, done: list[bool], good: str, waits: str) -> None:
            ready = sum(done)
            count = "" if total == 1 else f" ({ready} of {total})"
            self._check(version, kind, ready == total, "Ready" if ready == total else "Waiting",
                        (good if ready == total else waits) + count)  # fmt: skip

        slots = version.slots
        why = next((s.reason for s in slots if not s.ready and s.reason), "")
        line(
            "Cluster", [s.ready for s in slots], "up", f"its cluster to be up (locally 10 to 30 s): {why}".rstrip(": ")
        )
        said = next((s.message for s in slots if not s.healthy and s.message), "")
        line(
            "Application",
            [s.taken and s.healthy for s in slots],
            "healthy by Serve",
            f"Serve to call it healthy (usually 5 to 20 s after its cluster): {said}".rstrip(": "),
        )
        said = next((s.message for s in slots if s.healthy and s.message), "")
        line(
            "Endpoint",
            [s.fit(version.spec.id) for s in slots],
            "answers real requests through the load balancer",
            f"real requests to be answered through the load balancer: {said}".rstrip(": "),
        )

    # --- the end of a version -----------------------------------------------------------------------------

    def _retire(self, version: VersionData, reason: str) -> None:
        """It gets no traffic any more: drained, then its clusters are released."""
        if version.state in (ServiceVersionState.TERMINATING, ServiceVersionState.TERMINATED):
            return
        version.recalled = False
        self._enter_version(version, ServiceVersionState.TERMINATING, reason)

    def _tend_retired(self) -> None:
        for version in self.s.versions.values():
            if version.state != ServiceVersionState.TERMINATING:
                continue
            # Its backends must be out of the load balancer's traffic first, or it would be drained for ever. One that
            # can't be told holds nothing up when the whole service ends.
            out = not any(b.version_id == version.spec.id for b in self.s.backends)
            if out or self._ends_since(policies.TERMINATE_UNTOLD):
                self._start(f"end {version.spec.name}", partial(self._drain_and_release, version))

    def _ends_since(self, long: timedelta) -> bool:
        """The whole service is to end, and was so long ago."""
        return self.s.state == ServiceState.TERMINATING and workflow.now() - self.s.state_since >= long

    async def _drain_and_release(self, version: VersionData) -> None:
        """Undoes all that the version has. It may be recalled for as long as it drains."""
        if version.had_traffic:
            await asyncio.gather(*(self._drain(version, slot) for slot in version.slots))
        if version.recalled:
            return
        version.releasing = True
        if version.leaving:
            await workflow.wait_condition(lambda: not version.leaving)
        for slot in version.tended:
            # A cluster that is being asked for could come to be after its release.
            await workflow.wait_condition(partial(self._is_still, task_of(version, slot)))
            await self._release(version, slot, version.reason)
        version.slots, version.relief = [], []
        version.capacity, version.releasing, version.had_traffic = None, False, False
        version.ended_at = workflow.now()
        self._enter_version(version, ServiceVersionState.TERMINATED, version.reason)

    def _is_still(self, task: str) -> bool:
        return task not in self._tasks

    async def _drain(self, version: VersionData, slot: Slot) -> None:
        """Of a version that ends, which may be recalled; or of one cluster that was relieved, which is not."""
        relieved = slot in version.leaving

        def recalled() -> bool:
            return version.recalled and not relieved

        if not slot.ready or not slot.http or recalled():
            return
        limit = version.spec.rollout.drain_timeout_s
        if self.s.terminate is not None:
            limit = min(limit, policies.TERMINATE_DRAIN.total_seconds())
        slot.gate = "draining"
        try:
            seen = await self._command(
                slot,
                CommandKind.SERVE_DRAIN,
                {"timeout_s": limit},
                timedelta(seconds=limit) + policies.DRAIN_ANSWER,
                until=lambda: recalled() or self._ends_since(policies.TERMINATE_DRAIN),
            )
        except CommandOff:
            # Its head is gone, and all that was to be drained; or it is wanted again; or the service ends by now.
            if self._ends_since(policies.TERMINATE_DRAIN) and not recalled():
                self._event("drain_deadline", f"{version.spec.name}: the service ends", level=EventLevel.WARNING)
            return
        except ActivityError as error:
            self._event("drain_unconfirmed", f"{version.spec.name}: {error.cause or error}", level=EventLevel.WARNING)
            return
        if seen.get("drained"):
            self._event("drained", f"{version.spec.name}: nothing under way after {seen.get('seconds', 0):.1f} s")
        else:
            self._event(
                "drain_deadline",
                f"{version.spec.name}: after {limit:g} s {seen.get('ongoing')} requests and {seen.get('connections')} "
                "connections were still under way; they are ended with the cluster",
                level=EventLevel.WARNING,
            )

    async def _release(self, version: VersionData, slot: Slot, reason: str) -> None:
        """The cluster ends by itself once its lease is given back. Never given up."""
        if not slot.cluster_id:  # not asked by ``made``: a start that gave no answer may have begun all the same
            return
        while True:
            try:
                await workflow.execute_local_activity_method(
                    LeaseActivities.release_lease,
                    ReleaseLease(
                        cluster_id=slot.cluster_id,
                        release=Release(
                            holder=self.input.service_id, end=True, reason=f"{version.spec.name}: {reason}"
                        ),
                    ),
                    summary=f"release cluster {slot.cluster_id}",
                    **policies.RELEASE,
                )
                slot.made = False
                return
            except FailureError as error:
                workflow.logger.error("cluster %s can't be released: %s", slot.cluster_id, error.cause or error)
                await workflow.sleep(10, summary="the cluster could not be told: tell it again")

    def _wishes(self) -> list[tuple[datetime, str]]:
        found = super()._wishes()
        if self.s.state == ServiceState.TERMINATING:
            found.append((self.s.state_since + policies.TERMINATE_DRAIN, "what is still drained is ended"))
            found.append((self.s.state_since + policies.TERMINATE_UNTOLD, "the load balancer is waited for no longer"))
        for version in self.s.versions.values():
            if version.state not in LIVING:
                continue
            for slot in version.tended:
                if not slot.made and slot.not_before is not None:
                    found.append((slot.not_before, f"back-off before cluster {slot.number} of {version.spec.name}"))
                if slot.failed and slot.not_before is not None:
                    found.append(
                        (slot.not_before, f"give cluster {slot.number} of {version.spec.name} its config again")
                    )
                if slot.made and not slot.ready and slot.asked_at is not None:
                    found.append((slot.asked_at + policies.LEASE_RECHECK, "ask a silent cluster"))
        return found


def task_of(version: VersionData, slot: Slot) -> str:
    return f"cluster {slot.number} of {version.spec.name}"
