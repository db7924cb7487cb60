"""What opening a sampler needs besides the sampler: where its bundle is, how it samples, errors that keep nothing."""

from __future__ import annotations

import os
from pathlib import Path

from ki_edge import flow
from ki_edge.bundle import Bundle
from ki_edge.errors import ArgumentError, BackendError, BundleError


def detached(error: BackendError) -> BackendError:
    """The error without its tracebacks, which would keep sessions and their memory alive."""
    found: BaseException | None = error
    while found is not None:
        found.__traceback__ = None
        found = found.__cause__ or found.__context__
    return error


def folder_of(bundle: str | Path | Bundle) -> Path:
    """Where a bundle lies. ArgumentError for what is neither a path nor a bundle."""
    if isinstance(bundle, Bundle):
        return bundle.path
    if not isinstance(bundle, str | os.PathLike):
        raise ArgumentError(f"bundle: expected a folder or an opened bundle, got {type(bundle).__name__}")
    return Path(bundle)


def sampling_of(bundle: Bundle) -> tuple[str, int]:
    """(time convention, default number of steps) of the manifest."""
    sampling = bundle.manifest.sampling
    convention, steps = sampling.get("time_convention"), sampling.get("num_steps")
    try:
        flow.check_steps(steps)  # type: ignore[arg-type]
        flow.denoise_times(1, str(convention))
    except ArgumentError as error:
        raise BundleError(f"{bundle.path}: manifest 'sampling': {error}") from None
    return str(convention), int(steps)  # type: ignore[arg-type]
