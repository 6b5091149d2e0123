"""A model with weights set by hand, so that its circuit is known: a previous-token head and an induction head.

The residual stream has four blocks of eight dimensions: token, position, previous token, answer. Head 0.0 attends to
the previous position (q: position, k: position + 1) and writes its token to "previous token". Head 1.0 attends to the
position after an earlier occurrence of the current token (q: token, k: previous token) and writes the token there to
"answer", which the unembedding reads. Heads 0.1 and 1.1 and the MLPs add nothing.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

SIZE = 8
TOKEN, POSITION, BEFORE, ANSWER = (slice(SIZE * block, SIZE * (block + 1)) for block in range(4))
HEAD = 2 * SIZE


def induction_model() -> GPT2LMHeadModel:
    """Create the model in ``eval()`` mode."""
    width = 4 * SIZE
    config = GPT2Config(
        vocab_size=SIZE, n_positions=SIZE, n_embd=width, n_layer=2, n_head=2, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double().eval()
    eye, ahead = torch.eye(SIZE), torch.eye(SIZE).roll(1, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
        transformer = model.transformer
        transformer.wte.weight[:, TOKEN] = eye
        transformer.wpe.weight[:, POSITION] = eye
        model.lm_head.weight[:, ANSWER] = eye
        reads = (((POSITION, 12 * eye), (POSITION, 12 * ahead), (TOKEN, eye)),
                 ((TOKEN, 12 * eye), (BEFORE, 12 * eye), (TOKEN, eye)))  # fmt: skip
        for block, read, write in zip(transformer.h, reads, (BEFORE, ANSWER), strict=True):
            for kind, (source, matrix) in enumerate(read):
                start = kind * width
                block.attn.c_attn.weight[source, start : start + SIZE] = matrix.double()
            block.attn.c_proj.weight[:SIZE, write] = eye.double()
    return model


def induction_prompts(count: int = 6) -> list[tuple[list[int], list[int], int]]:
    """Create prompts 0 x A B y A, which B follows; in the corrupted ones, the first A is another token."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        x, a, b, y, other = (1 + torch.randperm(SIZE - 1, generator=generator)[:5]).tolist()
        rows.append(([0, x, a, b, y, a], [0, x, other, b, y, a], b))
    return rows
