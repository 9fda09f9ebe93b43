"""The times and sizes that users do not set. Tests hand in smaller ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long the parts of a node wait, how often they look, and how much they keep."""

    #: Delay of the first retry in seconds. It doubles with each attempt.
    first_retry: float = 1.0

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

    #: Seconds before a refused command is sent again which a service can do without.
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


#: The times and sizes of a service.
TIMING = Timing()
