"""Check that a model has embeddings for the tokens of its tokenizer.

A model may have more embeddings than its tokenizer has tokens, because rows are padded to a round number. It has fewer
if tokens were added only to the tokenizer. That does no harm as long as none of those tokens occurs.
"""

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gossamer.errors import GossamerError

_REMEDY = "give the tokenizer that the model was trained with, or save the model after resize_token_embeddings"


def embeddings(model: PreTrainedModel) -> int:
    """Number of tokens that the model can both read and predict."""
    maps = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(len(each.weight) for each in maps if each is not None)


def require_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Int[Tensor, "..."], name: str
) -> None:
    """Raise if the model has no embedding for one of the tokens.

    Args:
        model: the model that will read the tokens.
        tokenizer: the tokenizer that produced them.
        ids: token ids, of any shape.
        name: what was tokenized, for the error message.

    Raises:
        GossamerError: naming the token, and the number of tokens of tokenizer and model.
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
    """Raise if the tokenizer has tokens without an embedding in the model; for text in which any token may occur.

    Raises:
        GossamerError: naming the number of tokens of tokenizer and model.
    """
    known = embeddings(model)
    if (largest := max(tokenizer.get_vocab().values())) >= known:
        raise GossamerError(
            f"{name} may have tokens that the model does not know: the tokenizer has {len(tokenizer)} tokens "
            f"(numbers to {largest}), the model embeddings for {known} only; {_REMEDY}"
        )
