"""One process, many callers: OpenAI's HTTP interface over the core's engine.

Lazy: importing this package imports neither torch nor the web framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lfm2_mm.server.options import Limits, ServerOptions

if TYPE_CHECKING:
    from lfm2_mm.server.app import create_app

__all__ = ["Limits", "ServerOptions", "create_app"]


def __getattr__(name: str) -> Any:
    if name == "create_app":
        from lfm2_mm.server.app import create_app

        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
