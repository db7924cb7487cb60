"""`ki-serve`: a policy behind openpi's websocket protocol, for many robots at once.

    from ki_runtime.serving import Server
    with Server(Policy.load("bundle"), ServerOptions(port=8000)) as server: ...

Imports: backends, monitoring, policy, remote; of ki_edge: bundle, files, policy.
"""

from typing import TYPE_CHECKING

from ki_edge.public_names import public_names

if TYPE_CHECKING:
    from ki_runtime.serving.engine import Engine, LocalEngine
    from ki_runtime.serving.options import ServerOptions
    from ki_runtime.serving.question import Question
    from ki_runtime.serving.server import Server

__getattr__, __dir__ = public_names(
    __name__,
    {
        "ki_runtime.serving.engine": "Engine LocalEngine",
        "ki_runtime.serving.options": "ServerOptions",
        "ki_runtime.serving.question": "Question",
        "ki_runtime.serving.server": "Server",
    },
)

__all__ = ["Engine", "LocalEngine", "Question", "Server", "ServerOptions"]
