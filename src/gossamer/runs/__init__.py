"""Runs: settings, directory, training job, and the estimate of memory and time."""
