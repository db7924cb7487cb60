"""prometheus-client, imported when it is needed."""

from __future__ import annotations

from typing import Any

from ki_edge.errors import BackendError


def prometheus() -> Any:
    """The package. BackendError if it is not installed."""
    try:
        import prometheus_client
        import prometheus_client.core
    except ImportError:
        raise BackendError("metrics need prometheus-client: pip install 'ki-edge[serve]'") from None
    return prometheus_client
