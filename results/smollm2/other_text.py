"""Loss and open fraction of sparse models, and of dense controls, on the held-out blocks of another run.

python results/smollm2/other_text.py BLOCKS_OF RUN [RUN ...]
"""

import sys
from functools import partial
from pathlib import Path

from gossamer import counted_links
from gossamer.errors import GossamerError
from gossamer.evaluation.language import measure_language
from gossamer.evaluation.sparsity import LinkTally
from gossamer.models.pretrained import load_dense
from gossamer.training.run import Run, load_control, load_sparse


def main(blocks_of: Path, runs: list[Path]) -> None:
    other = Run(blocks_of)
    blocks = other.blocks("held_out")
    dense = measure_language(load_dense(other.config().model)[0], blocks).loss
    print(f"{other.config().model}: {dense:.3f} nat")
    for run in (other, *map(Run, runs)):
        model = load_sparse(run)
        tally = LinkTally.empty(model.config.num_hidden_layers, model.config.num_attention_heads)
        with counted_links(model) as counts:
            counted = partial(tally.add, counts, queries=0)
            loss = measure_language(model, blocks, after_batch=counted).loss
        print(f"{run.folder}: {loss:.3f} nat ({loss - dense:+.3f}), {100 * tally.open_fraction:.3f} % open")
        if run.control.exists():
            loss = measure_language(load_control(run), blocks).loss
            print(f"{run.folder}, dense control: {loss:.3f} nat ({loss - dense:+.3f})")


if __name__ == "__main__":
    try:
        if len(sys.argv) < 2:
            raise GossamerError("which runs? other_text.py BLOCKS_OF RUN [RUN ...]")
        main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
    except GossamerError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
