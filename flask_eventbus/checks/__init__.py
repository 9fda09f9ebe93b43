"""The doctor: what ``flask eventbus check`` finds, without a terminal.

``doctor`` runs all checks of a program, of its database and of its server; each yields a
finding of ``findings``.
"""
