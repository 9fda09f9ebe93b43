"""Whether this process is at its end."""

from __future__ import annotations

import threading

#: Set once the buses of the process were stopped for its end: nobody waits any more for a
#: thread that starts now.
process_ends = threading.Event()
