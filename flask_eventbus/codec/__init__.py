"""Events to bytes and back.

``codec`` packs an event: ``envelope`` writes and reads its attributes, ``values`` its payload,
with the types that msgpack lacks in ``forms``. ``records`` are the bytes of retries and dead
letters. ``faults`` names what is wrong with bytes that are no event. ``entry_ids`` reads the ids
of stream entries.
"""
