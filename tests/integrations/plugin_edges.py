"""Run by LeRobot's Python: the plugin's corners that need its tensors and no whole command.

    plugin_edges.py BUNDLE

Every function that begins with `check_` must return; prints their names.
"""

import sys
from types import SimpleNamespace

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import RTCAttentionSchedule
from lerobot.policies.factory import make_policy_config, make_pre_post_processors
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from lerobot.utils.import_utils import register_third_party_plugins

from ki_edge.errors import ArgumentError, KiEdgeError, ObservationError
from ki_edge.overlap import prefix_weights
from ki_edge.policy.contract import generic

register_third_party_plugins()
from lerobot_policy_ki_edge.modeling_ki_edge import KiEdgePolicy  # noqa: E402
from lerobot_policy_ki_edge.observations import input_features, observations_of  # noqa: E402
from lerobot_policy_ki_edge.overlapping import joining  # noqa: E402

HORIZON, ACTIONS, STATE = 10, 7, 8


def refuses(error: type[KiEdgeError], words: str, call: object, *arguments: object, **named: object) -> None:
    try:
        call(*arguments, **named)
    except error as found:
        assert words in str(found), found
    else:
        raise AssertionError(f"not refused: {words}")


def runtime(**given: object) -> SimpleNamespace:
    contract = generic(["front"], state_dim=STATE, action_dim=ACTIONS, action_horizon=HORIZON)
    return SimpleNamespace(**{"contract": contract, "rtc": "guided", "max_delay": None, **given})


def batch(rows: int = 1, **more: object) -> dict[str, object]:
    rng = np.random.default_rng(0)
    pictures = {
        f"observation.images.{name}": torch.from_numpy(rng.integers(0, 256, (rows, 3, 48, 64)).astype(np.float32) / 255)
        for name in ("front", "wrist")
    }
    state = torch.from_numpy(rng.uniform(-1, 1, (rows, STATE)).astype(np.float32))
    return {**pictures, "observation.state": state, "task": ["pick up the red cube"] * rows, **more}


def check_weights_are_lerobots(policy: KiEdgePolicy) -> None:
    """Every schedule, delay and horizon: the rows weigh as LeRobot weighs them."""
    left = torch.ones(HORIZON, ACTIONS)
    for schedule in RTCAttentionSchedule:
        for horizon in range(1, HORIZON + 1):
            config = RTCConfig(execution_horizon=horizon, prefix_attention_schedule=schedule)
            for delay in range(HORIZON + 1):
                given = joining(runtime(), left, delay, None, config)
                overlap, guiding = given["previous"], given["guiding"]
                end = max(guiding.end, overlap.delay)
                ours = prefix_weights(overlap.delay, end, HORIZON, guiding.schedule)
                theirs = RTCProcessor(config).get_prefix_weights(min(delay, horizon), horizon, HORIZON).numpy()
                executed = np.arange(HORIZON) < delay  # rows that are executed meanwhile count fully here, always
                theirs = np.where(executed, 1.0, theirs)
                if delay <= horizon:
                    assert np.allclose(ours, theirs, atol=1e-6), (schedule, horizon, delay, ours, theirs)


def check_what_lerobot_filled_with_zeros_is_held(policy: KiEdgePolicy) -> None:
    left = torch.ones(HORIZON, ACTIONS)
    left[4:] = 0
    left[2] = 0  # a row of zeros before the end is a command
    given = joining(runtime(), left, 9, None, None)
    assert len(given["previous"].actions) == 4 and given["previous"].delay == 4
    assert joining(runtime(), torch.zeros(HORIZON, ACTIONS), 2, None, None) == {}
    assert joining(runtime(), None, 2, 5, None) == {}
    assert joining(runtime(rtc=None), None, 2, 5, None) == {}
    refuses(ArgumentError, "cannot continue", joining, runtime(rtc=None), left, 2, None, None)
    assert len(joining(runtime(), torch.ones(40, ACTIONS), None, None, None)["previous"].actions) == HORIZON
    assert joining(runtime(), torch.ones(1, 3, ACTIONS), 1, 2, None)["guiding"].end == 2
    refuses(ArgumentError, "of one robot", joining, runtime(), torch.ones(2, 3, ACTIONS), 1, None, None)


def check_trained_delays(policy: KiEdgePolicy) -> None:
    trained = runtime(rtc="trained", max_delay=3)
    ways = [joining(trained, torch.ones(8, ACTIONS), delay, None, None)["way"] for delay in (0, 3, 4)]
    assert ways == ["trained", "trained", "guided"]


def check_pictures(policy: KiEdgePolicy) -> None:
    """Bytes come back exactly for openpi's resizing; LeRobot's gets the floats."""
    every = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    given = {"observation.state": torch.zeros(1, 2), "observation.images.front": every.float() / 255}
    bytes_ = generic(["front"], state_dim=2, action_dim=2, action_horizon=2)
    for kind in (torch.float32, torch.float16, torch.float64):
        cast = {key: value.to(kind) for key, value in given.items()}
        found = observations_of(cast, bytes_)[0]["observation.images.front"]
        assert found.dtype == np.uint8 and np.array_equal(found, every[0].numpy())
    floats = generic(["front"], state_dim=2, action_dim=2, action_horizon=2, resize="torch_pad")
    assert observations_of(given, floats)[0]["observation.images.front"].dtype == np.float32


def check_tasks(policy: KiEdgePolicy) -> None:
    contract = policy.runtime.contract
    for task, expected in (("a", ["a", "a"]), (["a"], ["a", "a"]), (["a", "b"], ["a", "b"]), ("", [None] * 2)):
        found = observations_of(batch(2, task=task), contract)
        assert [row.get("task") for row in found] == expected
    refuses(ObservationError, "one for each of 2 rows", observations_of, batch(2, task=["a", "b", "c"]), contract)


def check_wrong_batches(policy: KiEdgePolicy) -> None:
    for words, wrong in (
        ("observation.state: expected a tensor [B, 8]", {"observation.state": None}),
        ("observation.state: expected a tensor [B, 8]", {"observation.state": torch.zeros(8)}),
        ("the policy's contract has (8,)", {"observation.state": torch.zeros(1, 5)}),
        (
            "observation.images.front: expected a tensor [1, 3, h, w]",
            {"observation.images.front": torch.zeros(3, 8, 8)},
        ),
        ("unknown camera top", {"observation.images.top": torch.zeros(1, 3, 8, 8)}),
        ("NaN", {"observation.state": torch.full((1, STATE), float("nan"))}),
    ):
        refuses(ObservationError, words, policy.predict_action_chunk, {**batch(), **wrong})
    refuses(ArgumentError, "noise: expected [1, 10, 32]", policy.predict_action_chunk, batch(), noise=torch.zeros(1))
    refuses(
        ArgumentError, "takes one robot", policy.predict_action_chunk, batch(2), prev_chunk_left_over=torch.ones(3, 7)
    )


def check_rows_of_a_batch(policy: KiEdgePolicy) -> None:
    """As one after the other."""
    both, noise = batch(2), torch.randn(2, HORIZON, 32)
    found = policy.predict_action_chunk(both, noise=noise)
    for row in range(2):
        alone = {key: value[row : row + 1] for key, value in both.items()}
        assert torch.equal(policy.predict_action_chunk(alone, noise=noise[row : row + 1])[0], found[row])
    policy.reset()
    assert policy.select_action(both, noise=noise).shape == (2, ACTIONS)


def check_queue(policy: KiEdgePolicy) -> None:
    """A chunk's share, then another chunk; a reset forgets what is left."""
    calls, predict = [], policy.predict_action_chunk
    policy.predict_action_chunk = lambda *given, **more: calls.append(1) or predict(*given, **more)
    policy.reset()
    for _ in range(5):
        policy.select_action(batch())
    assert len(calls) == 2  # of 4 actions each
    policy.reset()
    policy.select_action(batch())
    assert len(calls) == 3
    del policy.predict_action_chunk


def check_names(policy: KiEdgePolicy) -> None:
    """A camera under another name; what a policy reads as LeRobot compares it."""
    rename = {"observation.images.top": "observation.images.front"}
    given = batch()
    given["observation.images.top"] = given.pop("observation.images.front")
    contract = policy.runtime.contract
    assert "observation.images.front" in observations_of(given, contract, rename)[0]
    assert set(input_features(contract, rename)) == {
        "observation.images.top", "observation.images.wrist", "observation.state"
    }  # fmt: skip
    assert policy.config.output_features["action"].shape == (ACTIONS,)


def check_processors_change_no_value(policy: KiEdgePolicy) -> None:
    before, after = make_pre_post_processors(policy.config)
    given = batch()
    found = before(dict(given))
    for key, value in given.items():
        assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value, key
    action = torch.randn(1, ACTIONS)
    assert torch.equal(after(action), action)


def check_it_is_not_trained(policy: KiEdgePolicy) -> None:
    for call in (policy.get_optim_params, lambda: policy.forward({}), policy.config.get_optimizer_preset):
        try:
            call()
        except NotImplementedError as error:
            assert "export it again" in str(error)
        else:
            raise AssertionError("it was trained")
    assert not list(policy.parameters())


def check_other_configurations_are_refused(policy: KiEdgePolicy) -> None:
    refuses(ArgumentError, "not ki_edge", KiEdgePolicy.from_pretrained, config=make_policy_config("pi05", device="cpu"))
    refuses(ArgumentError, "expected a folder", KiEdgePolicy.from_pretrained)


def main() -> None:
    config = PreTrainedConfig.get_choice_class("ki_edge")(bundle=sys.argv[1], device="cpu", n_action_steps=4)
    policy = KiEdgePolicy.from_pretrained(config=config)
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check(policy)
            print(name)  # noqa: T201


if __name__ == "__main__":
    main()
