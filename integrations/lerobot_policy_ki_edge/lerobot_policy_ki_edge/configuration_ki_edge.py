"""What `--policy.type=ki_edge` takes."""

from dataclasses import dataclass

from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig


@PreTrainedConfig.register_subclass("ki_edge")
@dataclass
class KiEdgeConfig(PreTrainedConfig):
    """A policy that is in a bundle. Shapes, names and statistics come from there.

    bundle            its folder; or ws://HOST:PORT of a policy server, which draws its own noise
    contract          of a server that does not tell it, as openpi's: a JSON file, or the name of openpi's configuration
    backend, threads  the engine, as of `ki-run`; "auto": the fastest that can
    digest            run only the bundle with this digest, which its export printed
    num_steps         of denoising; None: the bundle's
    n_action_steps    actions of a chunk that are executed before the next inference; None: the bundle's
    rename            names of cameras and state in LeRobot -> the policy's, where they differ:
                      {"observation.images.top": "observation.images.front"}
    rtc_config        how chunks are joined; `lerobot-rollout --inference.type=rtc` sets it
    """

    bundle: str = ""
    contract: str | None = None
    backend: str = "auto"
    threads: int | None = None
    digest: str | None = None
    num_steps: int | None = None
    n_action_steps: int | None = None
    rename: dict[str, str] | None = None
    rtc_config: RTCConfig | None = None
    action_feature_names: list[str] | None = None  # filled from the bundle: LeRobot orders a robot's commands by it
    push_to_hub: bool = False  # type: ignore[assignment]

    @property
    def observation_delta_indices(self) -> None:
        """Present observations alone."""

    @property
    def action_delta_indices(self) -> None:
        """It is not trained."""

    @property
    def reward_delta_indices(self) -> None:
        """It is not trained."""

    def get_optimizer_preset(self) -> None:  # type: ignore[override]
        """A bundle is not trained."""
        raise NotImplementedError(NOT_TRAINED)

    def get_scheduler_preset(self) -> None:
        """A bundle is not trained."""

    def validate_features(self) -> None:
        """The bundle's contract is checked where it is opened, and each observation against it."""


NOT_TRAINED = "ki_edge runs an exported policy: train its checkpoint with LeRobot, and export it again with ki-export"
