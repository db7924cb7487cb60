"""What an observation must look like before the model takes it."""

from dataclasses import replace

import pytest
import torch

from ki_edge.errors import ObservationError


def test_good_ones_pass(observe, small_model):
    observe([[True, False]], [3]).check(small_model.config)
    observe([[True], [False]], [3, 1], [2, 5]).check(small_model.config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": torch.zeros(2, 2, 14, 14, 3).double()},
            r"images: torch.float64 \[2, 2, 14, 14, 3\], expected torch.uint8",
        ),
        ({"images": torch.zeros(2, 2, 3, 14, 14, dtype=torch.uint8)}, r"expected torch.uint8 \[B, N, 14, 14, 3\]"),
        ({"images": torch.zeros(2, 14, 14, 3, dtype=torch.uint8)}, "images"),
        (
            {"camera_mask": torch.ones(2, 3, dtype=torch.bool)},
            r"camera_mask: torch.bool \[2, 3\], expected .* \[2, 2\]",
        ),
        ({"camera_mask": torch.ones(2, 2)}, "camera_mask: torch.float32"),
        ({"prompt_mask": torch.ones(2, 4)}, "prompt_mask: torch.float32"),
        (
            {"prompt_mask": torch.ones(2, 3, dtype=torch.bool)},
            r"prompt_mask: torch.bool \[2, 3\], expected .* \[2, 4\]",
        ),
        ({"prompt_tokens": torch.zeros(1, 4).long()}, r"prompt_tokens \[1, 4\] and its mask"),
        ({"fast_tokens": None}, "both or neither"),
        ({"fast_mask": None}, "both or neither"),
        ({"fast_mask": torch.ones(2, 5)}, "fast_mask: torch.float32"),
        ({"fast_mask": torch.ones(2, 4, dtype=torch.bool)}, r"fast_mask: torch.bool \[2, 4\], expected .* \[2, 5\]"),
        (
            {"fast_tokens": torch.zeros(2, 0).long(), "fast_mask": torch.ones(2, 0, dtype=torch.bool)},
            "fast_tokens: no token at all",
        ),
    ],
)
def test_wrong_ones_are_refused(observe, small_model, changes, message):
    observation = replace(observe([[True, True], [True, False]], [4, 2], [5, 3]), **changes)
    with pytest.raises(ObservationError, match=message):
        small_model.sample_actions(observation)
