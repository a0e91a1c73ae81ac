"""MileBench (arXiv 2404.18532) for lmms-eval: its published files in, its own scores out.

The folder is MILEBENCH in the environment, `MileBench` by default, as it is published: SUBSET/SUBSET.json with
`meta_data` and `data`, and SUBSET/images. A sample has `task_instruction_id`, `task_instance` (`context`, in which
`{image#1}` stands for a picture, `images_path`, and perhaps `choice_list`) and `response`.

How a prompt is put together follows `utils.py`, and the scores `evaluate.py`, of the repository MileBench/MileBench at
commit 730e930: open questions by ROUGE-L as the package `rouge` 1.0.1 counts it, choices by matching, MMCoQA by whether
the answer is said. No judge is asked. Three things differ: a picture goes where its number says (there: the n-th to the
n-th place), pictures without a place come first, and nothing is cut to a model's length.
"""

import json
import os
import re
from functools import cache, partial
from pathlib import Path

FOLDER = Path(os.environ.get("MILEBENCH", "MileBench"))
SUBSETS = {
    "clevr_change": "CLEVR-Change",
    "spot_the_diff": "Spot-the-Diff",
    "docvqa": "DocVQA",
    "slidevqa": "SlideVQA",
    "webqa": "WebQA",
    "wikivqa": "WikiVQA",
    "mmcoqa": "MMCoQA",
    "multimodalqa": "MultiModalQA",
}
PLACE = re.compile(r"\{(?:image|table)#(\d+)\}")

# ---- data -----------------------------------------------------------------------------------------------------------


@cache
def about(subset: str) -> dict:
    """The `meta_data` of a subset."""
    return json.loads((FOLDER / subset / f"{subset}.json").read_text(encoding="utf-8"))["meta_data"]


def with_meta_data(subset: str, docs):
    """Samples that say everything themselves: instruction, kind of question, where the pictures are."""

    def complete(doc: dict) -> dict:
        instructions = about(subset)["task_instruction"]
        kind = "said" if "MMCoQA" in subset else about(subset)["question_type"]
        paths = [str(FOLDER / subset / "images" / path) for path in doc["task_instance"]["images_path"]]
        return {"instruction": instructions[int(doc["task_instruction_id"])], "kind": kind, "paths": paths}

    return docs.map(complete)


# The YAML files name these: files_docvqa, docs_docvqa and so on.
for _key, _subset in SUBSETS.items():
    globals()[f"files_{_key}"] = {"data_files": {"test": str(FOLDER / _subset / f"{_subset}.json")}, "field": "data"}
    globals()[f"docs_{_key}"] = partial(with_meta_data, _subset)


def text_of(doc: dict) -> str:
    """Instruction and context, pictures still as `{image#1}`, and the choices."""
    text = f"{doc['instruction']}\n{doc['task_instance']['context']}"
    if choices := doc["task_instance"].get("choice_list"):
        listed = "\n".join(f"{chr(65 + i)}. {choice}" for i, choice in enumerate(choices))
        text += f"\nChoice list: \n{listed}\nYour answer is: "
    return text


def doc_to_text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """For models that take their pictures apart from the text."""
    return PLACE.sub(r"<Image \1> ", text_of(doc))


def doc_to_visual(doc: dict) -> list:
    from PIL import Image

    return [Image.open(path).convert("RGB") for path in doc["paths"]]


def doc_to_messages(doc: dict) -> list[dict]:
    """One user turn with the pictures in their places."""
    pictures, content, at, text = doc_to_visual(doc), [], 0, text_of(doc)
    placed = {int(n) for n in PLACE.findall(text)}
    content += [{"type": "image", "url": p} for n, p in enumerate(pictures, 1) if n not in placed]
    for found in PLACE.finditer(text):
        if (before := text[at : found.start()]).strip():
            content.append({"type": "text", "text": before})
        if 0 < int(found[1]) <= len(pictures):
            content.append({"type": "image", "url": pictures[int(found[1]) - 1]})
        at = found.end()
    content.append({"type": "text", "text": text[at:]})
    return [{"role": "user", "content": content}]


def doc_to_target(doc: dict) -> str:
    return str(doc["response"])


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """The score of one answer, which MileBench averages over a subset."""
    return {"milebench": score(doc["kind"], results[0], doc_to_target(doc), doc["task_instance"].get("choice_list"))}


# ---- scores ---------------------------------------------------------------------------------------------------------


def score(kind: str, answer: str, right: str, choices: list[str] | None = None) -> float:
    """0 to 1. kind: "open-ended", "multi-choice", or "said" for MMCoQA."""
    answer, right = normal(answer), normal(right)
    if kind == "said":
        return float(right in answer)
    if kind == "open-ended":
        return rouge_l(answer, right)
    options = [normal(choice) for choice in choices]
    if right not in options:
        raise ValueError(f"the right answer {right!r} is none of the choices {options}")
    return float(chosen(answer, options) == chr(65 + options.index(right)))


PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")


def normal(text: str) -> str:
    """Text as it is compared: lower case, most punctuation gone."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out, number = text, DIGIT_COMMA_DIGIT.search(text)
    for mark in PUNCTUATION:
        apart = f"{mark} " in text or f" {mark}" in text or number
        out = out.replace(mark, "" if apart else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)  # no more, since there flags are passed as the count
    return out.strip("'").strip('"').strip().lower()


def escaped(text: str) -> str:
    return re.sub(r"[\\.^$*+?{}\[\]|()]", r"\\\g<0>", text)


def chosen(answer: str, options: list[str]) -> str:
    """The letter that an answer stands for; several letters, or none, where it is not clear.

    Args:
        answer, options: normal.
    """
    letters = [chr(65 + i) for i in range(len(options))]
    if not answer:
        return "C"
    lettered = [escaped(normal(f"{letter} {option}")) for letter, option in zip(letters, options, strict=True)]
    if found := re.search("|".join(lettered), answer):
        return found[0][0].upper()
    plain = [escaped(normal(option)).replace(" ", "") for option in options]
    if found := re.search("|".join(plain), answer.replace(" ", "")):
        for letter, option in zip(letters, plain, strict=True):
            if found[0].strip() == option:  # with its backslashes, so that such an option is passed over there, too
                return letter
    return "".join(c.upper() for c in answer if c.upper() in letters)


def rouge_l(answer: str, right: str) -> float:
    """F of ROUGE-L over sentences: of the sets of words, how many lie in longest common subsequences."""
    hypothesis, reference = ([" ".join(s.split()) for s in text.split(".") if s] for text in (answer, right))
    if not hypothesis or not reference:
        return 0.0
    words = [{word for sentence in side for word in sentence.split(" ")} for side in (hypothesis, reference)]
    common = {w for r in reference for h in hypothesis for w in common_words(r.split(" "), h.split(" "))}
    precision, recall = (len(common) / len(side) for side in words)
    return 2 * (precision * recall / (precision + recall + 1e-8))


def common_words(x: list[str], y: list[str]) -> list[str]:
    """A longest common subsequence; of several the one that goes back along y first."""
    table = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, a in enumerate(x, 1):
        for j, b in enumerate(y, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    i, j, found = len(x), len(y), []
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            found.append(x[i])
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found
