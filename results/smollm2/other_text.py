"""Loss and open fraction of sparse models, and of dense controls, on the held-out blocks of another run.

python results/smollm2/other_text.py BLOCKS_OF RUN [RUN ...]
"""

import sys
from pathlib import Path

import torch

import gossamer
from gossamer.models.pretrained import load_dense
from gossamer.training.run import Run, held_out_loss, load_control


def main(blocks_of: Path, runs: list[Path]) -> None:
    other = Run(blocks_of)
    blocks = other.blocks("held_out")
    dense = held_out_loss(load_dense(other.config().model)[0], blocks, precision="fp32")
    print(f"{other.config().model}: {dense:.3f} nat")
    for folder in [blocks_of, *runs]:
        model = gossamer.load(folder / "model")
        opened = allowed = 0
        for batch in blocks.split(8):
            with torch.no_grad(), gossamer.counted_links(model) as counts:
                model(input_ids=batch, use_cache=False)
            opened += sum(int(count.open_links.sum()) for count in counts.values())
            allowed += sum(int(count.allowed_links.sum()) for count in counts.values())
        loss = held_out_loss(model, blocks, precision="fp32")
        print(f"{folder}: {loss:.3f} nat ({loss - dense:+.3f}), {100 * opened / allowed:.3f} % open")
        if Run(folder).control.exists():
            loss = held_out_loss(load_control(Run(folder)), blocks, precision="fp32")
            print(f"{folder}, dense control: {loss:.3f} nat ({loss - dense:+.3f})")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("which runs? other_text.py BLOCKS_OF RUN [RUN ...]")
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
