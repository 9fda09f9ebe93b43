"""Publish events: the path from ``send()`` to Redis.

An event passes through the files in this order:

1. ``publisher`` packs the payload and creates a ``message`` with its destination, a channel or a
   stream.
2. ``buffer`` holds the message until it is written. If it is full, old channel events are dropped.
3. ``writer`` takes a batch from the buffer. Its thread writes the batch, or a sender that waits
   for a confirmation does.
4. ``connection`` sends the batch to Redis and reads the replies.
5. ``outage`` counts and logs the results, and tracks whether Redis is unavailable.
"""
