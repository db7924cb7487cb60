"""Every error that ki_edge raises on purpose.

    KiEdgeError
    ├── CheckpointError   (ValueError)    a checkpoint folder or its tensors are not what a π0.5 model needs
    ├── ContractError     (ValueError)    a policy contract is incomplete or contradicts itself
    ├── BundleError       (ValueError)    a bundle on disk is damaged, foreign or too new
    ├── DatasetError      (ValueError)    demonstrations or recorded files cannot be read
    │   └── DivergedError                 training met a loss or a gradient that is not finite
    ├── ObservationError  (ValueError)    an observation does not fit the contract
    │   └── PromptError                   its prompt is missing, empty or too long
    ├── ArgumentError     (ValueError)    a wrong argument of a call: noise shape, number of steps, names
    ├── ExportError       (RuntimeError)  an export could not be written
    │   └── ParityError                   it was written and does not equal the reference
    ├── BackendError      (RuntimeError)  an inference backend is missing or failed
    │   ├── DeviceError                   the accelerator is lost; only a new process can use it again
    │   └── DeviceMemoryError             the accelerator's memory does not suffice
    └── RobotError        (RuntimeError)  a robot cannot be opened, observed or moved

Each message says what was given, what was expected, where, and what to do. The command line prints it as one line and
exits with status 2 (ParityError: 1).
"""


class KiEdgeError(Exception):
    """Root of all errors raised by ki_edge, ki_export and ki_runtime."""


class CheckpointError(KiEdgeError, ValueError):
    """A checkpoint cannot be read or does not hold a π0.5 model."""


class ContractError(KiEdgeError, ValueError):
    """A policy contract lacks something or contradicts itself."""


class BundleError(KiEdgeError, ValueError):
    """A bundle is damaged, foreign, or of a newer schema."""


class DatasetError(KiEdgeError, ValueError):
    """Demonstrations or a recorded file cannot be read."""


class DivergedError(DatasetError):
    """A loss or gradient is not finite. `step`, and (source, row) of the samples whose own loss is not, if any."""

    def __init__(self, message: str, step: int, samples: list[tuple[int, int]]) -> None:
        super().__init__(message)
        self.step, self.samples = step, samples


class ObservationError(KiEdgeError, ValueError):
    """An observation does not fit the policy contract."""


class PromptError(ObservationError):
    """The prompt is missing, empty, or longer than the contract allows."""


class ArgumentError(KiEdgeError, ValueError):
    """A call was given an argument out of range or of the wrong shape."""


class ExportError(KiEdgeError, RuntimeError):
    """An export could not be written."""


class ParityError(ExportError):
    """An export was written and does not agree with its reference."""


class BackendError(KiEdgeError, RuntimeError):
    """An inference backend is missing, unknown, or failed."""


class DeviceError(BackendError):
    """The accelerator is lost: nothing that this process holds there can be used again."""


class DeviceMemoryError(BackendError):
    """The accelerator's memory does not suffice."""


class RobotError(KiEdgeError, RuntimeError):
    """A robot is unknown, or cannot be opened, observed or moved."""
