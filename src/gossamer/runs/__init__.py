"""A run: its settings, its directory, the whole job, and the estimate before it."""
