"""Carries blinker signals between Flask services, and to plain scripts, over Redis."""

from __future__ import annotations

__version__ = "0.1.0"
