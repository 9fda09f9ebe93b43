"""The commands ``flask eventbus ...`` and ``python -m flask_eventbus ...``, and their output.

``app`` is the group that Flask loads; ``base`` is what commands have in common. Nothing that a
web page would need as well is here: that is in :mod:`flask_eventbus.admin`.
"""
