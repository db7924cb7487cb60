"""A policy that must be complete, from the description that inspection and export share."""

from ki_edge.errors import CheckpointError
from ki_export.policies import PolicyFiles, describe_policy


def read_policy(folder, format, settings, config, request) -> PolicyFiles:
    """CheckpointError lists everything that is missing, or says what does not fit; ContractError, ArgumentError."""
    found = describe_policy(folder, format, settings, config, request)
    if found.files is None:
        raise CheckpointError(f"{folder} is not a complete policy: {'; '.join(found.missing)}")
    return found.files
