"""Which positions have to be computed again, compared with a plain search over paths."""

from itertools import product

import torch

from gossamer.circuits.positions import changed_positions


def plainly(changed: torch.Tensor, spreads: bool) -> list[set[int]]:
    """Positions of each layer whose output differs from the earlier run and leads to the last position's output."""
    layers, tokens = changed.shape

    def reads(layer: int, query: int, key: int) -> bool:
        return key <= query and (spreads or bool(changed[layer, query]))

    differs = {(0, at): False for at in range(tokens)}
    for layer, at in product(range(layers), range(tokens)):
        from_keys = spreads and any(differs[layer, key] for key in range(at + 1))
        differs[layer + 1, at] = bool(changed[layer, at]) or differs[layer, at] or from_keys
    needed = {(layers, tokens - 1)}
    for layer in range(layers - 1, -1, -1):
        for query in range(tokens):
            if (layer + 1, query) in needed:
                needed |= {(layer, key) for key in range(tokens) if key == query or reads(layer, query, key)}
    return [
        {at for at in range(tokens) if (layer + 1, at) in needed and differs[layer + 1, at]} for layer in range(layers)
    ]


def test_every_position_that_differs_and_matters_is_computed() -> None:
    generator, saved = torch.Generator().manual_seed(0), 0
    for case in range(300):
        layers, tokens = 1 + case % 4, 1 + case % 7
        changed = torch.rand(layers, tokens, generator=generator) < (0.1, 0.3)[case % 2]
        for spreads in (False, True):
            found = changed_positions(changed, spreads=spreads)
            assert len(found) == layers
            for own, wanted in zip(found, plainly(changed, spreads), strict=True):
                assert wanted <= set(own.tolist())
                assert len(own) > 0
                assert own.tolist() == sorted(set(own.tolist()))
                saved += tokens - len(own)
            assert found[-1][-1] == tokens - 1
    assert saved > 300 * 3


def test_nothing_changed_is_one_position_per_layer() -> None:
    for spreads in (False, True):
        found = changed_positions(torch.zeros(3, 8, dtype=torch.bool), spreads=spreads)
        assert [each.tolist() for each in found] == [[7]] * 3
