"""What services and signals may be called: the names become parts of Redis keys and ACL rules."""

from __future__ import annotations

import re

#: A service's name: what receivers get as ``sender``.
SERVICE_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)

#: A signal's name.
SIGNAL_NAME = re.compile(r"\w[\w./-]{0,127}", re.ASCII)
