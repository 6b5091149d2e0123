"""Loss and open fraction of sparse models, and of dense controls, on the held-out blocks of another run.

python results/smollm2/other_text.py BLOCKS_OF RUN [RUN ...]
"""

import sys
from pathlib import Path

from gossamer.errors import GossamerError
from gossamer.measures.language import measure_language
from gossamer.models.pretrained import load_dense
from gossamer.runs.record import Run, load_control, load_sparse


def main(blocks_of: Path, runs: list[Path]) -> None:
    other = Run(blocks_of)
    blocks = other.blocks("held_out")
    dense = measure_language(load_dense(other.config().model)[0], blocks).loss
    print(f"{other.config().model}: {dense:.3f} nat")
    for run in (other, *map(Run, runs)):
        model = load_sparse(run)
        figures = measure_language(model, blocks)
        loss, links = figures.loss, figures.links
        print(f"{run.folder}: {loss:.3f} nat ({loss - dense:+.3f}), {100 * links.open_fraction:.3f} % open")
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
