"""The lanes of a node: how the events of each name are sealed, and how they travel."""

from __future__ import annotations

from ..codec.codec import Codec
from ..config import Age, Config
from ..errors import ConfigError
from ..routing.routes import Route
from ..transport.keys import ChannelKeys, StreamKeys
from .message import Lane
from .way import AgingStreamWay, ChannelWay, StreamWay, Way


class Ways:
    """Finds the way that the events of a name go, by their route and the settings."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._channels = ChannelKeys(config.prefix)
        self._streams = StreamKeys(config.prefix)

    def way(self, name: str, route: Route) -> Way:
        """The way that ``route`` asks for; settings of the service stand in for its options."""
        if route.via == "channel":
            return ChannelWay(name, self._channels.key(name))

        key = self._streams.stream(name)
        kept = self._config.maxlen if route.maxlen is None else route.maxlen
        replicas = self._config.replicas if route.replicas is None else route.replicas

        if isinstance(kept, Age):
            return AgingStreamWay(name, key, age=kept.seconds, replicas=replicas)

        return StreamWay(name, key, maxlen=kept, replicas=replicas)


class Lanes:
    """Makes lanes, one for each name and way to travel, with the first event."""

    def __init__(self, config: Config, codec: Codec) -> None:
        self._service = config.service
        self._codec = codec
        self._ways = Ways(config)
        self._lanes: dict[tuple[str, str], Lane] = {}

    def lane(self, name: str, route: Route) -> Lane:
        """The lane of a name, as ``route`` has it."""
        key = (name, route.via)
        lane = self._lanes.get(key)

        if lane is None:
            return self._lanes.setdefault(key, self._make(name, route))

        if lane.route is not route and lane.route != route:
            lane = self._lanes[key] = self._make(name, route, lane)

        return lane

    def _make(self, name: str, route: Route, before: Lane | None = None) -> Lane:
        seal = self._codec.seal(self._service, name)
        lane = Lane(route=route, way=self._ways.way(name, route), seal=seal)

        if before is not None:
            # Those who listen count on.
            lane.numbers = before.numbers

        return lane


def check_route(config: Config, route: Route) -> None:
    """Refuse what the server of the settings cannot do.

    :raises ConfigError: the route asks for a stream in a cluster.
    """
    if route.via == "stream" and config.url.startswith("redis+cluster://"):
        raise ConfigError(
            f"The route of {route.name!r} asks for via 'stream', and 'EVENTBUS_URL' is a cluster, "
            "for which there are no streams yet. Use 'channel' there, or one Redis: 'redis://' or 'redis+sentinel://'."
        )
