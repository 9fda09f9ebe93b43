"""How often a receiver that failed is tried again."""

from __future__ import annotations

from collections.abc import Callable

from ..config import Config
from ..event import Event
from ..receivers.delivery import Delivery
from ..receivers.dispatcher import Dispatcher
from ..receivers.failures import Failure
from ..receivers.retries import allowed
from ..routing.bus_signal import Receiver
from ..routing.subscriptions import Subscription


class RetryCounts:
    """Of what the subscription, the receiver and the settings say, the count that goes first.

    :param asked: how often a receiver asks to be tried again at an event ``name``.
    """

    def __init__(
        self,
        *,
        config: Config,
        dispatcher: Dispatcher,
        asked: Callable[[str, Receiver], int | None],
    ) -> None:
        self._config = config
        self._dispatcher = dispatcher
        self._asked = asked

    def after(self, delivery: Delivery, failure: Failure) -> int:
        """The count of a receiver that failed at a delivery."""
        return self._of(delivery.subscription, delivery.name, failure.receiver)

    def of_receiver(self, subscription: Subscription, event: Event, name: str) -> int:
        """The count of the receiver called so, which is connected."""
        receivers = self._dispatcher.receivers(event, only=name)
        return self._of(subscription, event.name, receivers[0])

    def of_event(self, subscription: Subscription, event: Event) -> int:
        """The highest count of an event's receivers: how often it may end its worker."""
        receivers = self._dispatcher.receivers(event)
        counts = [self._of(subscription, event.name, receiver) for receiver in receivers]
        return max(counts, default=self._config.retries)

    def _of(self, subscription: Subscription, name: str, receiver: Receiver) -> int:
        asked = self._asked(name, receiver)
        return allowed(subscription.retries, asked, self._config.retries)
