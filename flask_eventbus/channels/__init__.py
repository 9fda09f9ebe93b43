"""Events over Redis pub/sub, which reach whoever listens now.

``listener`` subscribes to the channels of its ``hearing`` over a ``reader``; ``decoder`` makes
events of messages and counts those that ``sequences`` misses. The receivers of an event run in
:mod:`flask_eventbus.receivers`.
"""
