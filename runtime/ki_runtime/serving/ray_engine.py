"""A policy in many processes of a Ray cluster, behind the engine that the server knows.

The websocket stays here: the server's queue is fair and forgets what is too old, and Ray Serve hands each question to
a replica that is free. Several servers may stand before the same application.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ki_edge.bundle import Bundle
from ki_edge.commands import tell
from ki_edge.errors import BackendError
from ki_edge.policy.contract import PolicyContract
from ki_runtime.policy.assets import read_assets

from .engine import Answer
from .question import Question
from .ray_cluster import connect, gpus, line, state_of, wait
from .ray_options import RayOptions
from .ray_replica import Replica
from .reloading import Promise, differences

DEPLOYMENT = "policy"
START = 600.0  # seconds for replicas to load, prove and warm up
ANSWER = 60.0  # for a question
TRIES = 2  # a question whose replica dies is asked once again


class RayEngine:
    """Errors: BackendError without Ray, and where no replica starts, with the reason; BundleError for a bad bundle."""

    def __init__(self, bundle: str | Path, options: RayOptions, say: Callable[[str], object] = tell) -> None:
        self._path, self._options, self._say = Path(bundle).resolve(), options, say
        opened = Bundle.open(self._path, say=say)
        self.contract: PolicyContract = read_assets(opened).contract
        self.at_once = options.most
        self._digest = opened.digest
        self._cluster = connect(options, say)
        self._cluster.users.add(self)
        try:
            self._handle = self._started()
            self.metadata: Mapping[str, Any] = self._described()
            self.largest_batch: int = self.metadata["largest_batch"]
        except BaseException:
            self.close()
            raise

    async def answer(self, questions: Sequence[Question]) -> Sequence[Answer | Exception]:
        """Errors of the policy come back as values; a question whose replica dies is asked of another, once."""
        died = ""
        for _ in range(TRIES):
            try:
                return await asyncio.wait_for(self._handle.answer.remote(list(questions)), ANSWER)
            except (TimeoutError, asyncio.TimeoutError):
                raise BackendError(f"no replica answered within {ANSWER:g} s") from None
            except Exception as error:
                if not _is_death(error):
                    raise BackendError(f"Ray: {line(error)}") from None
                died = type(error).__name__
        raise BackendError(f"the replica that computed it died ({died}), and so did the next one: ask again")

    def reloaded(self) -> RayEngine:
        """An engine of the bundle that lies there now, once every replica has it: one after the other, each started and
        proven before one of the old ones ends. BackendError if they do not start; then the old ones go on.
        """
        if self.metadata["declared"]:
            raise BackendError(
                f"the application {self._options.application} was deployed by a configuration: change its argument "
                "'bundle' or 'digest' there, and deploy it again"
            )
        opened = Bundle.open(self._path, say=self._say)
        if (other := differences(self, Promise.of(opened))) is not None:  # once it is deployed it answers
            raise BackendError(f"it has another {other}, and clients know the old one: start a server for it")
        name = self._options.application
        self._deploy(opened.digest, again=True)
        wait(self._cluster.serve, name, START)
        new = object.__new__(RayEngine)
        new.__dict__.update(self.__dict__, _digest=opened.digest)
        new.metadata = new._described()
        new.largest_batch = new.metadata["largest_batch"]
        self._cluster.users.add(new)  # from here on the end of the old one leaves the cluster to it
        return new

    def close(self) -> None:
        """End the cluster if it was started here and no other engine uses it, the one before a reload or the one after.

        In any other cluster the replicas stay, for other servers.
        """
        used = self in self._cluster.users
        self._cluster.users.discard(self)
        if self._cluster.owned and used and not self._cluster.users:
            self._cluster.serve.delete(self._options.application, _blocking=False)
            self._cluster.ray.shutdown()

    def _started(self) -> Any:
        """Ray Serve's handle of the application, whose replicas run."""
        serve, name = self._cluster.serve, self._options.application
        found = state_of(serve, name)
        if found is None or found[0] != "RUNNING":
            self._deploy(self._digest)
            wait(serve, name, START)
            return serve.get_app_handle(name)
        handle = serve.get_app_handle(name)
        digest = handle.describe.remote().result(timeout_s=ANSWER)["digest"]
        if digest != self._digest:
            raise BackendError(
                f"the application {name} of this cluster serves another bundle ({digest[:12]}) "
                f"than {self._path} ({self._digest[:12]}): give another --ray-app, or reload its server"
            )
        self._say(f"the application {name} runs already: its replicas are used")
        return handle

    def _deploy(self, digest: str, *, again: bool = False) -> None:
        """Tell Ray Serve what is wanted; it starts and stops replicas by itself, every one with the version of now."""
        serve, options = self._cluster.serve, self._options
        actor = {"num_cpus": options.threads, "num_gpus": gpus(self._cluster.ray, options)}
        application = deployment(serve, ray_actor_options=actor, **_scaling(options)).bind(
            str(self._path),
            digest,
            backend=options.backend,
            threads=options.threads,
            prompt=options.prompt,
            trust_engines=options.trust_engines,
            largest_batch=options.largest_batch,
            again=again,
        )
        target = serve.RunTarget(application, name=options.application, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)

    def _described(self) -> Mapping[str, Any]:
        told = self._handle.describe.remote().result(timeout_s=ANSWER)
        return {**told, "name": self._path.name, "replicas": [self._options.least, self._options.most]}


def deployment(serve: Any, **more: Any) -> Any:
    """Ray Serve's deployment of `Replica`: a replica computes one batch at a time, and a new version starts one more
    replica and proves it before one of the old version ends.
    """
    return serve.deployment(
        Replica,
        name=DEPLOYMENT,
        max_ongoing_requests=1,
        max_surge_percent=1,  # of any number of replicas that is one more, since it is rounded up
        max_constructor_retry_count=2,
        health_check_period_s=2,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config={"log_level": "WARNING", "enable_access_log": False},  # not a line on the disk for each answer
        **more,
    )


def application(arguments: Mapping[str, Any]) -> Any:
    """The application of a configuration file of Ray Serve (`import_path`): `args` are those of `Replica`."""
    from ray import serve

    return deployment(serve).bind(**{**arguments, "declared": True})


def _scaling(options: RayOptions) -> dict[str, Any]:
    if options.least == options.most:
        return {"num_replicas": options.most}
    bounds = {"min_replicas": options.least, "max_replicas": options.most, "initial_replicas": options.least}
    return {"autoscaling_config": {**bounds, "target_ongoing_requests": 1, "upscale_delay_s": 2}}


def _is_death(error: Exception) -> bool:
    """Whether a replica was lost, and another may answer."""
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

    return isinstance(error, RayActorError | ReplicaUnavailableError) and not isinstance(
        error, DeploymentUnavailableError
    )
