"""gossamer plan."""

import re

from command_line import assert_refused, gossamer_command


def test_plan_says_whether_it_fits_and_what_would() -> None:
    roomy = gossamer_command("plan", "smollm2", "--gpus", 2, "--gpu-memory", 80)
    assert roomy.returncode == 0, roomy.stderr
    assert "134,515,008" in roomy.stdout
    assert "estimated" in roomy.stdout
    assert "It should fit" in roomy.stdout
    narrow = gossamer_command("plan", "llama-3.2-1b", "--gpu-memory", 16, "--train", "attention", "--seq-len", 2048)
    assert narrow.returncode == 0, narrow.stderr
    assert "It does not fit" in narrow.stdout
    assert "blocks of 2048 tokens; train attention" in narrow.stdout
    assert re.search(r"batch_size: 1, gradient_accumulation: 16.*: .* GiB, fits", narrow.stdout)
    assert "tokens/s" in narrow.stdout
    assert_refused(gossamer_command("plan", "gpt2", "--seq-len", 4096), "--seq-len 4096", "context of 1024")
