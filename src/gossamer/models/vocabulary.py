"""Whether a model has embeddings for the tokens that its tokenizer makes.

A model may well have more of them than its tokenizer has tokens: rows are padded to a round number. The reverse comes
of tokens that were added to a tokenizer alone. They do no harm as long as none of them occurs.
"""

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gossamer.errors import GossamerError

_REMEDY = "give the tokenizer that the model was trained with, or save the model after resize_token_embeddings"


def embeddings(model: PreTrainedModel) -> int:
    """How many tokens the model knows, read and predicted."""
    maps = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(len(each.weight) for each in maps if each is not None)


def require_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Int[Tensor, "..."], name: str
) -> None:
    """Stop at a token that the model does not know.

    Args:
        model: that will be given the tokens.
        tokenizer: that they come from.
        ids: of the tokens, of any shape.
        name: what they are the tokens of.

    Raises:
        GossamerError: naming the token and how many tokens tokenizer and model know.
    """
    known = embeddings(model)
    unknown = ids[ids >= known]
    if len(unknown):
        token = int(unknown[0])
        raise GossamerError(
            f"{name} has the token {tokenizer.convert_ids_to_tokens(token)!r} (number {token}); the tokenizer has "
            f"{len(tokenizer)} tokens, the model embeddings for {known} only; {_REMEDY}"
        )


def require_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Stop at a tokenizer with tokens that the model does not know, where any of them may occur.

    Raises:
        GossamerError: naming how many tokens tokenizer and model know.
    """
    known = embeddings(model)
    if (largest := max(tokenizer.get_vocab().values())) >= known:
        raise GossamerError(
            f"{name} may have tokens that the model does not know: the tokenizer has {len(tokenizer)} tokens "
            f"(numbers to {largest}), the model embeddings for {known} only; {_REMEDY}"
        )
