"""Encode events as bytes, and decode bytes as events.

To send an event, ``codec`` encodes its payload with ``values``, which knows the types that msgpack
lacks. If that fails, it finds the value at fault and its path. Its ``Envelope`` then adds the
attributes. To receive an event, ``codec`` decodes and checks the attributes, and ``values`` the
payload.

``records`` encodes and decodes retries and dead letters, and parses the ids of stream entries.
"""
