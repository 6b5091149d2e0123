"""Make two lm-eval-harness tasks from the held-out part of a text, for ``gossamer evaluate RUN --tasks``.

``last_word``: predict the last word of a sentence after at least 200 characters of context. The word already occurs in
the context, so that it can be known. ``continuation``: choose the next sentence from four, the true one and three from
elsewhere in the held-out part.

    python results/smollm2/tasks.py TEXT DIR
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from gossamer.files import atomic_directory
from gossamer.training.data import read_documents, split, text_files

EXAMPLES = 400
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")

YAML = {
    "last_word": """\
task: last_word
dataset_path: json
dataset_kwargs: {data_files: {test: last_word.jsonl}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{context}}"
doc_to_target: "{{' ' + word}}"
metric_list: [{metric: perplexity}, {metric: acc}]
metadata: {version: 1.0}
""",
    "continuation": """\
task: continuation
dataset_path: json
dataset_kwargs: {data_files: {test: continuation.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1.0}
""",
}


def passages(text: Path) -> Iterator[list[str]]:
    """The sentences of each held-out paragraph."""
    for file in text_files(text):
        for document in split(list(read_documents(file)))[1]:
            for paragraph in document.split("\n\n"):
                yield SENTENCE.split(" ".join(paragraph.split()))


def context_before(sentences: list[str], end: int) -> str:
    """The fewest sentences before ``end`` that have 200 characters together, or all sentences if they are shorter."""
    start = end
    while start > 0 and sum(map(len, sentences[start:end])) < 200:
        start -= 1
    return " ".join(sentences[start:end])


def last_words(paragraphs: list[list[str]]) -> Iterator[dict[str, object]]:
    """Yield contexts that end before the last word of a sentence, and that word."""
    for sentences in paragraphs:
        for end in range(1, len(sentences)):
            found = re.fullmatch(r"(.+) ([a-z]{4,})[.!?]", sentences[end])
            before = context_before(sentences, end)
            if found and len(before) >= 200 and re.search(rf"\b{found[2]}\b", before):
                yield {"context": f"{before} {found[1]}", "word": found[2]}


def continuations(paragraphs: list[list[str]], source: random.Random) -> Iterator[dict[str, object]]:
    """Yield contexts with four choices, one of them the next sentence."""
    everything = [s for sentences in paragraphs for s in sentences if 40 <= len(s) <= 200]
    for sentences in paragraphs:
        for end in range(1, len(sentences)):
            before = context_before(sentences, end)
            if len(before) >= 200 and 40 <= len(sentences[end]) <= 200:
                choices = [sentences[end], *source.sample(everything, 3)]
                answer = source.randrange(4)
                choices[0], choices[answer] = choices[answer], choices[0]
                yield {"context": before, "choices": choices, "answer": answer}


def main() -> None:
    """Write both tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    source = random.Random(0)
    paragraphs = list(passages(arguments.text))
    tasks = {"last_word": list(last_words(paragraphs)), "continuation": list(continuations(paragraphs, source))}
    with atomic_directory(arguments.out) as staging:
        for name, rows in tasks.items():
            chosen = source.sample(rows, min(EXAMPLES, len(rows)))
            (staging / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
            (staging / f"{name}.yaml").write_text(YAML[name])
            print(f"{name}: {len(chosen)} of {len(rows)} examples")


if __name__ == "__main__":
    main()
