"""What the fork server of :mod:`forked` loads. Nothing of ``gossamer.cli``: it reads the environment when imported."""

import gossamer.circuits.compare
import gossamer.demo.demonstrate
import gossamer.evaluation.evaluate
import gossamer.runs.job
import gossamer.runs.plan  # noqa: F401
