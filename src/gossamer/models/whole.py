"""Check that a loaded model is complete: no missing or unexpected weights, the right shapes, and it runs.

transformers initialises missing weights randomly, drops unexpected ones, and notices inconsistent config values only
when the model runs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from gossamer.errors import GossamerError
from gossamer.inputs import check_tensors, reading
from gossamer.models.architectures import PROVEN

OPTIONS: Mapping[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Options of ``from_pretrained`` that :func:`check_whole` needs."""

_SHOWN = 3


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' loading report; :func:`check_whole` reports faults in one line."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.get_logger("transformers.modeling_utils").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logging.get_logger("transformers.modeling_utils").setLevel(logging.NOTSET)
        logging.set_verbosity(before)


def check_whole(model: PreTrainedModel, found: Mapping[str, Any], name: str) -> None:
    """Raise if a model is incomplete.

    Args:
        model: a dense model loaded with :data:`OPTIONS`.
        found: the loading info that ``from_pretrained`` returned with it.
        name: the name to use in error messages.

    Raises:
        GossamerError: naming the weights, or what is wrong with the config.
    """
    remedy = "save the model anew, config and weights together"
    if missing := sorted(found["missing_keys"]):
        raise GossamerError(f"{name} is not whole: it lacks {_some(missing)}; {remedy}")
    if unexpected := sorted(found["unexpected_keys"]):
        raise GossamerError(f"{name} has weights that its config.json has no place for: {_some(unexpected)}; {remedy}")
    if mismatched := sorted(found["mismatched_keys"]):
        key, has, wants = mismatched[0]
        raise GossamerError(
            f"{name}: the weight {key} has shape {list(has)}, by its config.json it should be {list(wants)}; {remedy}"
        )
    with reading(name, remedy):
        check_tensors({key: tensor for key, tensor in model.named_parameters() if not tensor.is_meta})
    if model.config.model_type in PROVEN:
        with reading(f"{name} with its config.json", remedy):
            _check_runs(model)


@torch.no_grad()
def _check_runs(model: PreTrainedModel) -> None:
    # Two tokens, because a single one can attend only to itself.
    longest = getattr(model.config, "max_position_embeddings", None)
    longest = 2 if longest is None else longest
    if longest < 1:
        raise ValueError(f"max_position_embeddings is {longest}")
    ids = torch.zeros(1, min(2, longest), dtype=torch.long)
    training = model.training
    logits = model.eval()(input_ids=ids, use_cache=False).logits
    model.train(training)
    if not logits.isfinite().all():
        raise ValueError("it gives logits that are not finite")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
