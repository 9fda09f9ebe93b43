"""The times and sizes that users do not set. Tests hand in smaller ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long the parts of a node wait, how often they look, and how much they keep."""

    # -- streams

    #: Delay of the first retry in seconds. It doubles with each attempt.
    first_retry: float = 1.0

    #: Maximum random increase of a retry's delay, as a fraction of it, so that retries spread out.
    retry_jitter: float = 0.25

    #: Seconds between two checks for released entries and due retries. One round trip checks all
    #: streams.
    check_released_every: float = 5.0

    #: Seconds without a sign of life after which a consumer without pending entries is removed.
    idle_consumer_after: float = 600.0

    #: Pause reading if no receiver has started for this many seconds while deliveries are queued.
    pause_reading_after: float = 1.0

    #: Release queued deliveries to other workers if no receiver has started for this many seconds.
    #: By then a read that was running at the pause has ended.
    release_after: float = 2.5

    #: Seconds ahead for which due times of retries are kept. A later retry is found by the check
    #: that runs every :attr:`check_released_every` seconds.
    expect_within: float = 60.0

    #: Longest time in seconds that a worker without the receiver leaves a retry to other workers.
    max_postpone: float = 10.0

    #: Seconds between two searches for orphaned retries. They are kept for an hour, so this may be
    #: long.
    search_orphans_every: float = 300.0

    #: Seconds after which outcomes that Redis refused are written again.
    resend_after: float = 5.0

    #: Seconds without a refusal after which the log says that Redis allows the maintenance again.
    granted_after: float = 60.0

    #: Seconds between two searches for streams that match patterns.
    list_streams_every: float = 2.0

    #: Seconds between two searches while there are more streams than patterns may match.
    list_many_streams_every: float = 30.0

    #: Maximum number of streams that the patterns of a service match, and that a command reads.
    max_names: int = 1_000

    #: Seconds before a refused stream is read again.
    ask_stream_again_after: float = 5.0

    #: Seconds before a command that Redis refused, and that is not essential, is sent again.
    ask_command_again_after: float = 60.0

    #: Seconds between two checks for entries that were trimmed, once a group has read them all.
    check_trimmed_every: float = 30.0

    #: Seconds between two checks for a stream that was deleted and created again.
    check_flushed_every: float = 5.0

    #: Seconds that Redis may take to answer a read of streams, including the wait for an entry.
    answer_timeout: float = 5.0

    #: Maximum number of entries that are counted after the start of a new group.
    max_counted: int = 1_000

    #: Maximum number of entries that one command lists.
    page: int = 100

    # -- connections and channels

    #: Seconds without traffic after which a server gets a PING. It detects an outage before the
    #: next event, and keeps firewalls from closing an idle connection.
    ping_after: float = 5.0

    #: Seconds that a server has to answer a PING. A server that hangs is noticed after the sum of
    #: both.
    ping_timeout: float = 5.0

    #: Seconds between two ROLE commands on a connection that writes.
    ask_role_every: float = 1.0

    #: Seconds that one read of channels waits for bytes. After each, the reading thread checks
    #: whether to stop.
    tick: float = 1.0

    #: Longest wait of a reading thread between two attempts to connect, in seconds. Channel events
    #: sent meanwhile are missed.
    max_listener_backoff: float = 1.0

    #: Seconds to wait for the listener to end, before its last events must be finished.
    listener_end: float = 2.0

    #: Maximum number of ids, routes and nodes that are remembered; the oldest is dropped first.
    max_remembered: int = 10_000

    #: Maximum number of hashes of all routes. Each takes 40 bytes of memory.
    max_hashes: int = 262_144

    #: Number of former node names that a process remembers, because their events may still arrive.
    max_former: int = 1_000

    #: Maximum number of queued deliveries.
    max_ahead: int = 1_000

    # -- publishing

    #: Seconds that a round trip of the publisher may take before Redis counts as away.
    write_timeout: float = 2.0

    #: Longest wait of the publisher between two attempts in seconds; short, so that events leave
    #: soon after an outage.
    max_writer_backoff: float = 2.0

    #: Seconds to wait after an outage before buffered channel events are sent: a little more than
    #: the longest wait of a listener before it reconnects.
    listeners_return: float = 1.5

    #: Largest number of events in one round trip of the publisher.
    batch_events: int = 512

    #: Seconds after which the relay publishes events again that Redis refused.
    refused_again_after: float = 5.0


#: The times and sizes of a service.
TIMING = Timing()
