"""An explanation as JSON, GraphML and text. ``docs/metrics.md`` documents the keys."""

import json
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gossamer.circuits.mask_search import UnitSet
from gossamer.explanations.explain import ExplainedLink, Explanation
from gossamer.explanations.reasons import Reason

FORMAT = 1
"""Version of the record format."""


def explanation_record(
    explanation: Explanation, tokenizer: PreTrainedTokenizerBase, *, model: str, dense: Explanation | None = None
) -> dict[str, Any]:
    """Build the record of an explanation, with the dense model's under ``dense`` if it is given.

    Args:
        explanation: of the model.
        tokenizer: of both models.
        model: the user's name for the model.
        dense: the dense model's explanation of the same prediction.
    """
    prediction = explanation.prediction
    record = {
        "format": FORMAT,
        "model": model,
        "ids": list(prediction.ids),
        "tokens": [tokenizer.decode([token]) for token in prediction.ids],
        "corrupted_ids": None if explanation.corrupted is None else list(explanation.corrupted),
        "target": _token(tokenizer, prediction.target),
        "against": None if prediction.against is None else _token(tokenizer, prediction.against),
        "metric": prediction.metric_name,
        **_of_model(explanation, tokenizer),
    }
    if dense is not None:
        record["dense"] = _of_model(dense, tokenizer)
        record["dense_links_per_link"] = len(dense.sets[0]) / max(1, len(explanation.sets[0]))
    return record


def _of_model(explanation: Explanation, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    first = explanation.sets[0]
    seeds = [
        {"seed": seed, "size": len(each), "kept": each.kept, "left_when_cut": each.left_when_cut}
        for seed, each in zip(explanation.seeds, explanation.sets, strict=True)
    ]
    return {
        "kind": explanation.kind,
        "share": explanation.share,
        "metric_full": explanation.full,
        "metric_none": explanation.nothing,
        "candidates": explanation.candidates,
        "size": len(first),
        "kept": first.kept,
        "left_when_cut": first.left_when_cut,
        "links": _links(explanation, first),
        "found_by": explanation.found_by()[first.chosen].tolist(),
        "overlap": explanation.overlap,
        "seeds": seeds,
        "shares": {
            f"{share:g}": {
                "size": len(each),
                "kept": each.kept,
                "left_when_cut": each.left_when_cut,
                "links": _links(explanation, each),
            }
            for share, each in explanation.by_share.items()
        },
        "details": [_detail(each, tokenizer) for each in explanation.details],
    }


def _links(explanation: Explanation, chosen: UnitSet) -> list[list[int]]:
    links: Tensor = explanation.links[chosen.chosen]
    found: list[list[int]] = links.tolist()
    return found


def _token(tokenizer: PreTrainedTokenizerBase, token: int) -> dict[str, Any]:
    return {"id": token, "text": tokenizer.decode([token])}


def _detail(each: ExplainedLink, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    effect, reason = each.effect, each.reason
    return {
        "link": list(each.link),
        "weight": effect.weight,
        "gate": reason.gate,
        "lost_alone": effect.alone,
        "lost_from_set": effect.in_set,
        "found_by": each.found_by,
        "promotes": [tokenizer.decode([token]) for token in effect.promotes],
        "demotes": [tokenizer.decode([token]) for token in effect.demotes],
        "pairs": [{"query": query, "key": key, "part": part} for query, key, part in reason.pairs],
        "tests": _tests(reason),
    }


def _tests(reason: Reason) -> list[dict[str, Any]]:
    return [
        {
            "side": test.side,
            "writer": test.writer,
            "part": test.part,
            "gate_fixed": test.gate_fixed,
            "gate_recomputed": test.gate_recomputed,
            "closes": test.closes,
        }
        for test in reason.tests
    ]


def as_json(record: dict[str, Any]) -> str:
    """A record as JSON."""
    return json.dumps(record, allow_nan=False) + "\n"


def graphml(record: dict[str, Any]) -> str:
    """The links of a record as GraphML: one node per token and layer that a link touches, one edge per link."""
    import networkx as nx

    graph = nx.MultiDiGraph()
    tokens = record["tokens"]
    details = {tuple(each["link"]): each for each in record["details"]}
    for layer, head, query, key in record["links"]:
        for place, at in ((query, layer + 1), (key, layer)):
            graph.add_node(f"{place}@{at}", token=tokens[place], position=place, layer=at)
        found = details.get((layer, head, query, key))
        more = {} if found is None else {"weight": found["weight"], "lost_from_set": found["lost_from_set"]}
        graph.add_edge(f"{key}@{layer}", f"{query}@{layer + 1}", layer=layer, head=head, **more)
    return "\n".join(nx.generate_graphml(graph)) + "\n"


def in_words(record: dict[str, Any], count: int = 10) -> list[str]:
    """A short summary as lines of text: the numbers, then the ``count`` strongest links."""
    target, metric = record["target"]["text"], record["metric"]
    versus = "" if record["against"] is None else f" rather than {record['against']['text']!r}"
    lines = [
        f"{target!r}{versus}: {metric} {record['metric_full']:.3f} with all {record['candidates']:,} links, "
        f"{record['metric_none']:.3f} with none",
        _numbers(record),
    ]
    if record.get("dense"):
        lines.append(f"dense model: {_numbers(record['dense'])}")
    tokens, shown = record["tokens"], record["details"][:count]
    if shown:
        lines.append(f"the strongest {len(shown):,} of {record['size']:,} links, and the share lost without each:")
    for each in shown:
        layer, head, query, key = each["link"]
        promoted = " ".join(repr(text) for text in each["promotes"][:3])
        line = (
            f"layer {layer} head {head}: {tokens[query]!r} ({query}) reads {tokens[key]!r} ({key}), weight "
            f"{each['weight']:.2f}; lost: {100 * each['lost_from_set']:.0f} %; promotes {promoted}"
        )
        closing = [f"{test['writer']} at the {test['side']}" for test in each["tests"] if test["closes"]]
        if closing:
            line += f"; its gate closes without {' or '.join(closing[:3])}"
        lines.append(line)
    return lines


def _numbers(record: dict[str, Any]) -> str:
    overlap = ""
    if record["overlap"] is not None:
        overlap = f"; the sets of {len(record['seeds'])} seeds overlap by {record['overlap']:.2f}"
    return (
        f"{record['size']:,} links ({record['kind']}): alone they keep {100 * record['kept']:.0f} % of the difference, "
        f"without them {100 * record['left_when_cut']:.0f} % is left{overlap}"
    )
