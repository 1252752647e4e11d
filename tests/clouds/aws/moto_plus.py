"""moto's server in a thread, with the behaviour of AWS that a control plane's safety rests on and moto 5.2.5 lacks:

- RunInstances is idempotent by ClientToken: the same arguments give the same instance, whatever has become of it;
  others are refused (IdempotentParameterMismatch).
- Instances are pending, then running; shutting-down, then terminated.
- AssumeRole asks the role's trust policy for its external id in every account, and knows when there is no such role.
- RunInstances makes as many as MaxCount says; a machine may end by itself, and says why it ended.
- Disks and network interfaces may outlive a machine (``moto_keeps``).
- GetConsoleOutput gives what the machine printed.
- Presigned URLs of S3 carry what they were signed for: method, host, path, query, signed headers, until they expire;
  other headers of AWS's are refused, and so are bytes with another checksum than the one that is announced.
- What is not there is forbidden to who may not list the bucket (``moto_s3``).
- A load balancer's name is there once; targets' health is what the test says, and ``unused`` where no rule names them.
- Faults: codes, delays and lost answers, by action and argument (``moto_faults``); ``after_boot`` is told of machines.

Nothing of moto is changed on disk. Its classes are patched when this module is imported: names of 5.2.5.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")  # 1,301 of them, for each account
os.environ["MOTO_ENABLE_AMI_VALIDATION"] = "1"
os.environ["MOTO_EC2_ENABLE_INSTANCE_TYPE_VALIDATION"] = "1"

from moto.core.exceptions import AccessDeniedError
from moto.core.responses import ActionResult
from moto.ec2 import ec2_backends
from moto.ec2.exceptions import EC2ClientError
from moto.ec2.models.instances import Instance, InstanceBackend, StateReason
from moto.ec2.responses.general import General
from moto.ec2.responses.instances import InstanceResponse
from moto.ec2.utils import Base64EncodedString
from moto.elbv2.exceptions import DuplicateLoadBalancerName
from moto.elbv2.models import ELBv2Backend, FakeTargetGroup, elbv2_backends
from moto.iam.models import iam_backends
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.server import MotoRequestHandler
from moto.sts.models import STSBackend
from werkzeug.serving import make_server

from tests.clouds.aws import moto_retained as moto_keeps
from tests.clouds.aws.moto_faults import Fault, Faulty
from tests.clouds.aws.moto_iam import holds
from tests.clouds.aws.moto_s3 import s3_backends

__all__ = [
    "KNOBS",
    "Fault",
    "Knobs",
    "ec2_backends",
    "elbv2_backends",
    "ends",
    "iam_backends",
    "s3_backends",
    "serving",
]


@dataclass
class Knobs:
    boot_s: float = 0.05
    stop_s: float = 0.05
    after_boot: Callable[[Instance], None] | None = None
    unhealthy: set[str] = field(default_factory=set)
    """Targets of load balancers that fail their health check, ``ip:port``."""
    console: Callable[[Instance], str] = lambda _instance: "hello from boot\n"
    """What a machine has printed so far."""
    faults: list[Fault] = field(default_factory=list)
    calls: list[dict[str, str]] = field(default_factory=list)
    """The arguments of those to EC2, STS and ELBv2, by their names on the wire; ``Action`` among them."""


KNOBS = Knobs()
_lock = threading.RLock()
_current = threading.local()


# -- RunInstances

_run_response, _run_backend = InstanceResponse.run_instances, InstanceBackend.run_instances


def _idempotent(self: InstanceResponse) -> Any:
    token = self._get_param("ClientToken")
    given = repr(sorted((k, v) for k, v in self.data.items() if k not in ("ClientToken", "Timestamp")))
    with _lock:
        seen = self.ec2_backend.__dict__.setdefault("_by_token", {})
        if token in seen:
            reservation, before = seen[token]
            if before != given:
                raise EC2ClientError(
                    "IdempotentParameterMismatch",
                    "Arguments on this idempotent request are inconsistent with arguments used in previous request(s).",
                )
            return ActionResult(reservation)
        _current.count = int(self._get_param("MaxCount") or self._get_param("MinCount") or 1)
        answer = _run_response(self)
        seen[token] = (_current.reservation, given)
        return answer


def _remembered(self: InstanceBackend, image_id: str, count: int, *args: Any, **kwargs: Any) -> Any:
    _current.reservation = _run_backend(self, image_id, max(count, _current.__dict__.pop("count", 1)), *args, **kwargs)
    for instance in _current.reservation.instances:
        _become(instance, KNOBS.boot_s, "pending", "running", 16)  # not before: it is not whole yet
        if KNOBS.after_boot is not None:
            KNOBS.after_boot(instance)
    return _current.reservation


# Says "pending" of whatever it is; EC2 says what has become of it.
InstanceResponse.RESPONSE_KEY_PATH_TO_TRANSFORMER = {
    key: change
    for key, change in InstanceResponse.RESPONSE_KEY_PATH_TO_TRANSFORMER.items()
    if not key.startswith("RunInstances.")
}
InstanceResponse.run_instances = _idempotent  # type: ignore[method-assign]
InstanceBackend.run_instances = _remembered  # type: ignore[method-assign]


# -- states over time

_init, _terminate = Instance.__init__, Instance.terminate


def _become(
    instance: Instance,
    wait_s: float,
    before: str,
    name: str,
    code: int,
    then: Callable[[], None] = lambda: None,
) -> None:
    def change() -> None:
        if instance._state.name == before:
            instance._state.name, instance._state.code = name, code
            then()

    timer = threading.Timer(wait_s, change)
    timer.daemon = True
    timer.start()


def _starts(self: Instance, *args: Any, **kwargs: Any) -> None:
    moto_keeps.place(args[0], kwargs)
    _init(self, *args, **kwargs)
    self._state.name, self._state.code = "pending", 0


def _stops(self: Instance) -> Any:
    if self._state.name in ("terminated", "shutting-down"):
        return copy.copy(self._state)
    volumes = moto_keeps.hold(self)
    before = _terminate(self)
    self._state.name, self._state.code = "shutting-down", 32
    let_go = functools.partial(moto_keeps.let_go, self, volumes)
    _become(self, KNOBS.stop_s, "shutting-down", "terminated", 48, let_go)
    return before


def ends(instance: Instance, code: str, message: str) -> None:
    """It ends without anybody's call: shut down from inside, or taken back. ``code``: of its StateReason, e.g.
    ``Client.InstanceInitiatedShutdown``."""
    instance.terminate()
    instance.state_reason = StateReason(f"{code}: {message}", code)


Instance.__init__ = _starts  # type: ignore[method-assign]
Instance.terminate = _stops  # type: ignore[method-assign]


# -- AssumeRole

_assume = STSBackend.assume_role


def _trusted(
    self: STSBackend,
    region_name: str,
    role_session_name: str,
    role_arn: str,
    policy: Any,
    duration: int,
    external_id: str,
) -> Any:
    try:
        role = iam_backends[role_arn.split(":")[4]]["aws"].get_role_by_arn(role_arn)
        statements = json.loads(role.assume_role_policy_document)["Statement"]
        given = {"sts:ExternalId": external_id} if external_id else {}
        trusted = any(holds(s.get("Condition", {}), given) for s in statements)
    except Exception:
        trusted = False
    if not trusted:
        raise AccessDeniedError(user_arn="arn:aws:iam::111111111111:user/control-plane", action="sts:AssumeRole")
    return _assume(self, region_name, role_session_name, role_arn, policy, duration, external_id)


STSBackend.assume_role = _trusted  # type: ignore[method-assign]


# -- load balancers

_create_balancer, _health = ELBv2Backend.create_load_balancer, FakeTargetGroup.health_for


def _created_once(self: ELBv2Backend, name: str, *args: Any, **kwargs: Any) -> Any:
    with _lock:
        if any(balancer.name == name for balancer in self.load_balancers.values()):
            raise DuplicateLoadBalancerName()
        return _create_balancer(self, name, *args, **kwargs)


def _checked(self: FakeTargetGroup, target: dict[str, Any], ec2_backend: Any) -> Any:
    status = _health(self, target, ec2_backend)
    if status.status == "healthy":
        elb = elbv2_backends[self.account_id][self.region_name]
        if not elb._any_listener_using(self.arn):
            status.status = "unused"
        elif f"{status.instance_id}:{status.port}" in KNOBS.unhealthy:
            status.status = "unhealthy"
    return status


ELBv2Backend.create_load_balancer = _created_once  # type: ignore[method-assign]
FakeTargetGroup.health_for = _checked  # type: ignore[method-assign]


# -- GetConsoleOutput


def _console(self: General) -> ActionResult:
    instance = self.ec2_backend.get_instance(self._get_param("InstanceId"))
    output = KNOBS.console(instance) if instance.state in ("running", "pending") else ""
    return ActionResult({"InstanceId": instance.id, "Output": Base64EncodedString.from_raw_string(output)})


General.get_console_output = _console  # type: ignore[method-assign]


# -- the server


class _Quiet(MotoRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


@contextmanager
def serving(host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Its URL. One server for all tests: each takes an account of its own."""
    app = DomainDispatcherApplication(create_backend_app)
    faulty = Faulty(app, KNOBS.faults, KNOBS.calls)
    server = make_server(host, port, faulty, threaded=True, request_handler=_Quiet)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
