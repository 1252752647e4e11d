"""AMIs: resolves a name to an image, with the facts that a launch needs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from clouds.aws.account.session import AwsSession
from clouds.aws.machines.catalogue import InstanceType
from clouds.contract.errors import BadConfig
from heliostat.models.clouds import AwsConfig

PARAMETER_S = 3600
"""For so long an SSM parameter is taken to name the same AMI: new ones come every week or so."""


GPU_IMAGE = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-amazon-linux-2023/latest/ami-id"
"""Amazon's own with NVIDIA's driver, docker and its GPU runtime
(https://docs.aws.amazon.com/dlami/latest/devguide/aws-deep-learning-x86-base-gpu-ami-amazon-linux-2023.html)."""


@dataclass(frozen=True)
class Image:
    id: str
    root_device: str
    """E.g. ``/dev/xvda``: a disk under another name would be a second one."""
    root_gib: int
    """The least that its root disk may have."""
    architecture: str


def image_for(config: AwsConfig, known: InstanceType | None) -> str:
    """Which of the cloud's images a machine of this type boots; None: a type that is in no catalogue."""
    if known is not None and known.architecture == "arm64":
        return config.arm_image
    if known is not None and known.gpu:
        stock = config.image == AwsConfig.model_fields["image"].default
        return config.gpu_image or (GPU_IMAGE if stock else config.image)
    return config.image


class Images:
    """One call of SSM an hour for each parameter, and one of EC2 for each AMI."""

    def __init__(self, session: AwsSession, clock: Callable[[], float] = time.monotonic) -> None:
        self._session, self._clock = session, clock
        self._lock = threading.Lock()
        self._named: dict[str, tuple[str, float]] = {}
        self._images: dict[str, Image] = {}

    def get(self, image: str) -> Image:
        """By an AMI's id, or by the SSM parameter (``/…``) that names one. Raises BadConfig when there is none."""
        with self._lock:  # others wait for the first one's answer instead of asking too
            ami = self._resolved(image) if image.startswith("/") else image
            if ami not in self._images:
                self._images[ami] = self._described(ami)
            return self._images[ami]

    def _resolved(self, parameter: str) -> str:
        ami, until = self._named.get(parameter, ("", 0.0))
        if not ami or self._clock() > until:
            answer = self._session.call("ssm", "GetParameter", parameter, Name=parameter)
            ami = answer["Parameter"]["Value"]
            self._named[parameter] = (ami, self._clock() + PARAMETER_S)
        return ami

    def _described(self, ami: str) -> Image:
        found = self._session.call("ec2", "DescribeImages", ami, ImageIds=[ami])["Images"]
        if not found:
            raise BadConfig(
                f"There is no image {ami} in region {self._session.region}.",
                remedy="AMI ids are of one region and one owner: name one that the account sees there, or an SSM "
                "parameter.",
                resource=ami,
            )
        root = found[0]["RootDeviceName"]
        disks = {disk["DeviceName"]: disk.get("Ebs", {}) for disk in found[0]["BlockDeviceMappings"]}
        return Image(ami, root, int(disks.get(root, {}).get("VolumeSize", 1)), found[0]["Architecture"])
