"""Help, and the modules that the command line imports early."""

import re
import subprocess
import sys

from command_line import gossamer_command
from gossamer.cli import app


def test_the_command_line_loads_nothing_heavy_before_it_has_to() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
    line = [sys.executable, "-c", f"import sys, gossamer, gossamer.cli, gossamer.runs.settings_file; print({heavy})"]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout == "set()\n"


def test_help_names_every_command() -> None:
    result = gossamer_command("--help")
    assert result.returncode == 0
    verbs = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    assert len(verbs) > 10
    assert {verb for verb in verbs if not re.search(rf"^│ {verb}\s", result.stdout, re.MULTILINE)} == set()


def test_help_shows_what_a_user_decides_on_two_screens(command_here) -> None:
    lines = command_here("sparsify", "--help", columns=80)[1].splitlines()
    assert len(lines) <= 2 * 40
    assert max(map(len, lines)) <= 80
    options = {word for line in lines for word in re.findall(r"^│ [ *]+(--[a-z-]+)", line)}
    assert options == {
        "--text", "--out", "--preset", "--config", "--tokens", "--seq-len", "--constraint", "--slack", "--tau",
        "--epsilon", "--distillation", "--train", "--seed", "--resume", "--control", "--batch-size", "--report-to",
        "--stream", "--start-from", "--help",
    }  # fmt: skip
