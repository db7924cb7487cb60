"""How many replicas of a policy a Ray cluster is asked for, and what each of them gets."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any

from ki_edge.arguments import count
from ki_edge.errors import ArgumentError

MOST = 10_000  # replicas
APPLICATION = "ki-serve"


@dataclass(frozen=True)
class RayOptions:
    """`least` to `most` replicas, each with so many CPU threads and GPUs (None: one where the cluster has any).

    `application`: its name in Ray Serve; one that runs already is used as it is.
    """

    least: int = 1
    most: int = 1
    threads: int = 1
    gpus: float | None = None
    backend: str = "auto"
    prompt: str | None = None
    trust_engines: bool = False
    largest_batch: int = 1
    application: str = APPLICATION

    def __post_init__(self) -> None:
        count(self.threads, "threads", 1024)
        if not 1 <= self.least <= self.most <= MOST:
            raise ArgumentError(f"{self.least} to {self.most} replicas: expected 1 to {MOST}, the smaller number first")
        if self.gpus is not None and not 0 <= self.gpus <= 64:
            raise ArgumentError(f"{self.gpus} GPUs of a replica: expected 0 to 64")
        if re.fullmatch(r"[\w-]{1,63}", self.application) is None:
            raise ArgumentError(f"the application {self.application!r:.80}: expected letters, digits, - and _")


def add_ray(parser: argparse.ArgumentParser) -> None:
    """The arguments that `ray_options` reads."""
    add = parser.add_argument_group("many processes or machines").add_argument
    add(
        "--ray",
        action="store_true",
        help="compute in replicas on a Ray cluster: the one that runs, else one started here",
    )
    add("--replicas", type=int, metavar="N", help="of the policy; default: 1")
    add("--autoscale", metavar="MIN:MAX", help="as many replicas as there is work for")
    add(
        "--ray-gpus",
        type=float,
        metavar="G",
        help="GPUs of a replica, such as 0.5; default: 1 where the cluster has any",
    )
    add("--ray-app", metavar="NAME", help=f"name of the application; one that runs is used; default: {APPLICATION}")


def ray_options(given: argparse.Namespace, largest_batch: int) -> RayOptions | None:
    """What was asked for; None without --ray. ArgumentError for numbers that cannot be."""
    of_ray = ("replicas", "autoscale", "ray_gpus", "ray_app")
    if not given.ray:
        others = [f"--{name.replace('_', '-')}" for name in of_ray if getattr(given, name) is not None]
        if others:
            raise ArgumentError(f"{others[0]} is for --ray: give both")
        return None
    if given.replicas is not None and given.autoscale is not None:
        raise ArgumentError("--replicas N and --autoscale MIN:MAX: give one of them")
    least = most = 1 if given.replicas is None else given.replicas
    if given.autoscale is not None:
        bounds = re.fullmatch(r"(\d{1,6}):(\d{1,6})", given.autoscale)
        if bounds is None:
            raise ArgumentError(f"--autoscale {given.autoscale!r:.40}: expected MIN:MAX, such as 1:8")
        least, most = int(bounds[1]), int(bounds[2])
    more: dict[str, Any] = {} if given.ray_app is None else {"application": given.ray_app}
    return RayOptions(
        least=least,
        most=most,
        threads=1 if given.threads is None else given.threads,
        gpus=given.ray_gpus,
        backend=given.backend,
        prompt=given.prompt,
        trust_engines=given.trust_engines,
        largest_batch=largest_batch,
        **more,
    )
