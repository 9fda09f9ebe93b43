"""A service that tells which of its processes received what; tests serve it in every way."""
