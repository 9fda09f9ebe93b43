"""The commands ``flask eventbus ...`` and ``python -m flask_eventbus ...``, and their output.

A command passes through the files in this order:

1. ``app`` has ``run``, ``tail``, ``publish``, ``routes`` and ``check``, the list of all commands,
   and the group that Flask loads; ``flask_eventbus.__main__`` is the group without Flask.
2. ``base`` holds the program that a command works on, the base classes, which turn errors into one
   line and an exit code, and the options and arguments that commands share.
3. The other commands have files of their own: ``relay``, ``dead``, ``status`` with ``services``,
   and ``replay`` with ``seek``.
4. ``output`` formats events, tables and findings.

The work itself is done in :mod:`flask_eventbus.admin` and :mod:`flask_eventbus.checks`, without a
terminal, so that a web page can use it too.
"""
