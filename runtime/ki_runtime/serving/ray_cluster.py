"""The Ray cluster: which one, what it has room for, and how an application in it stands."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ki_edge.errors import BackendError

from .ray_options import RayOptions

STORE = 100 << 20  # bytes of Ray's object store in a cluster of this machine alone: questions pass through it
POLL = 0.2  # seconds between two looks at an application
PROBE = 3.0  # for a cluster to answer


@dataclass
class Cluster:
    """`owned`: it was started here, for this machine alone; `users`: engines that are not closed."""

    ray: Any
    serve: Any
    owned: bool
    users: set[Any] = field(default_factory=set)


def connect(options: RayOptions, say: Callable[[str], object]) -> Cluster:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise BackendError(f"--ray needs Ray ({error}): pip install 'ki-edge[ray]'") from None
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # what a robot or an operator should know is told here
    owned = False
    if not ray.is_initialized():  # a program may have connected already
        owned = _join_or_start(ray, options)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
    say(f"Ray {ray.__version__}: {'a cluster of this machine alone' if owned else 'the cluster that runs'}")
    return Cluster(ray, serve, owned)


def _join_or_start(ray: Any, options: RayOptions) -> bool:
    """Whether a cluster was started, for this machine alone; else the one of RAY_ADDRESS or of this machine is used."""
    quiet = {"log_to_driver": False, "configure_logging": False}
    if (address := running_cluster()) is not None:
        try:
            ray.init(address, **quiet)
        except Exception as error:
            if address != "auto" or not isinstance(error, ConnectionError):
                raise BackendError(f"the Ray cluster at {address} cannot be joined: {line(error)}") from None
        else:
            return False
    cpus = max(os.cpu_count() or 1, options.threads * (options.most + 1))  # one more while versions change
    ray.init("local", num_cpus=cpus, object_store_memory=STORE, include_dashboard=False, **quiet)
    return True


def running_cluster() -> str | None:
    """HOST:PORT of the cluster of RAY_ADDRESS, or of the one that `ray start` noted on this machine; without a note
    "auto", for Ray to look among the processes; None where the noted one does not answer or RAY_ADDRESS is "local".

    BackendError for a RAY_ADDRESS where nothing answers. Ray itself would try such addresses for minutes.
    """
    given = os.environ.get("RAY_ADDRESS", "auto")
    if given == "local":
        return None
    if given != "auto":
        if not _answers(given):
            raise BackendError(
                f"RAY_ADDRESS {given}: nothing answers there; expected HOST:PORT of a cluster's head, such as "
                "10.0.0.5:6379, on a machine of that cluster"
            )
        return given
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        noted = note.read_bytes()[:200].decode("ascii", "replace").strip()
    except OSError:
        return "auto"
    return noted if _answers(noted) else None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PROBE).close()
    except (OSError, ValueError, OverflowError):
        return False
    return bool(host)


def gpus(ray: Any, options: RayOptions) -> float:
    if options.gpus is not None:
        return options.gpus
    return 1.0 if options.backend != "ort" and ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def state_of(serve: Any, name: str) -> tuple[str, str] | None:
    """(status of an application, why); None where there is none."""
    found = serve.status().applications.get(name)
    if found is None:
        return None
    told = [found.message, *(one.message for one in found.deployments.values())]
    return found.status.value, " ".join(filter(None, told))


def wait(serve: Any, name: str, seconds: float) -> None:
    """Until every replica of the application is of the version that was deployed last. BackendError if that fails."""
    deadline = time.monotonic() + seconds
    while True:
        status, why = state_of(serve, name) or ("DEPLOYING", "")
        if status == "RUNNING":
            return
        if status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise BackendError(f"Ray Serve: {name} is {status}: {_reason(why)}")
        if time.monotonic() > deadline:
            raise BackendError(
                f"the replicas of {name} have not started within {seconds:g} s: has the cluster room for one more of "
                f"them? {_reason(why)}"
            )
        time.sleep(POLL)


def _reason(told: str) -> str:
    """The error at the end of a traceback that Ray Serve tells, or all of it."""
    errors = re.findall(r"(?:ki_edge\.errors\.)(\w+: [^\n]+)", told)
    return errors[-1] if errors else line(told)


def line(error: object) -> str:
    return " ".join(str(error).split())[:500]
