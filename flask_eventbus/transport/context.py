"""What all parts of a node share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config import Config
from ..logs import Counters
from ..timing import Timing
from .connections import Connections
from .keys import StreamKeys

if TYPE_CHECKING:
    from ..codec.codec import Codec


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The settings, connections and counters of a node, handed to each of its parts."""

    config: Config
    connections: Connections
    codec: Codec
    counters: Counters
    timing: Timing
    #: The unique name of the node.
    node: str
    #: Returns False once the app is gone; the threads of the node then end.
    app_exists: Callable[[], bool]

    @property
    def keys(self) -> StreamKeys:
        """The Redis keys of streams under the node's prefix."""
        return StreamKeys(self.config.prefix)
