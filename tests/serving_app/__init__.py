"""A service that tells which of its processes heard what; tests serve it in every way."""
