"""gunicorn for the Flask services: each value that is not a default, with its reason.

The number of workers is the environment's, ``WEB_CONCURRENCY``: on a channel every worker hears
every event, so it is the service that decides how many there may be.
"""

import logging

# What the bus tells, Redis lost and regained for example, stands beside gunicorn's own lines.
logging.basicConfig(
    level=logging.INFO,
    format="[%(asctime)s] [%(process)d] [%(levelname)s] %(name)s: %(message)s",
)

# The container's own network; Compose publishes it to this machine alone.
bind = "0.0.0.0:8000"

# A slow client, or a receiver that holds the interpreter for a while, must not fail /health.
worker_class = "gthread"
threads = 4

# Workers show that they live by a file; on a disk that may block, and the root is read-only.
worker_tmp_dir = "/dev/shm"  # noqa: S108 - memory of this container alone

# The drain: receivers finish (EVENTBUS_GRACE, 25 s), then what was read is handed back and what is
# buffered leaves (8 s, whatever Redis does). Compose waits longer still, see stop_grace_period.
graceful_timeout = 35

# A worker that drains while others already serve in its place, after a HUP, gives no sign of
# life: longer than the drain.
timeout = 60

# Its socket would be made in a home directory, and this user has none.
control_socket_disable = True
