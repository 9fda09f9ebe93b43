"""From ``send()`` to Redis.

``publisher`` makes an event of an emission and its ``message``; ``buffer`` holds messages that
wait. ``writer``, or the sender itself as ``leader``, takes a batch from the buffer and gives it
to ``connection``, which writes it and judges the answers. ``outage`` decides what happens while
Redis is away.
"""
