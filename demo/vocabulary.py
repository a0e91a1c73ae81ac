"""The demo model's tokens: every byte, the words of its questions and answers, one token for each key, and the special
tokens and chat template of Qwen2.5-VL.
"""

import re

from demo.boards import COLOURS, END, KEYS
from demo.tiny_vlm import SPECIAL

WORD = r" ?[A-Za-z0-9]+| ?[^\sA-Za-z0-9]|\s"
QUESTIONS = (
    "Where does point? Where do What colour is Which board has Compare What changed? Follow Read right from Read down "
    "Describe the row"
)
PLAIN = "system user assistant You are a helpful assistant. \n Picture"


def _words() -> list[str]:
    found = re.findall(WORD, PLAIN) + re.findall(WORD, QUESTIONS)
    found += [f" {w}" for w in (*COLOURS, END, "1", "2", "3", "4")]
    return [w for w in dict.fromkeys(found) if len(w) > 1]


def _alphabet() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level vocabulary, in the order of the bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    letters = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    return [letters[b] for b in range(256)]


ALPHABET = _alphabet()
VOCABULARY = [*ALPHABET, *(w.replace(" ", ALPHABET[32]) for w in _words()), *(ALPHABET[32] + k for k in KEYS), *SPECIAL]
KEY_TOKENS = range(len(VOCABULARY) - len(SPECIAL) - len(KEYS), len(VOCABULARY) - len(SPECIAL))
_ID = {t: i for i, t in enumerate(VOCABULARY)}


def token_id(token: str) -> int:
    return _ID[token]


def encode(text: str) -> list[int]:
    """What the tokenizer that `build` makes gives for text made of known words; thousands of times faster."""
    ids = []
    for part in re.findall(r"<\|\w+\|>| (?=<\|)|" + WORD, text):
        token = part if part.startswith("<|") else "".join(ALPHABET[b] for b in part.encode())
        ids += [_ID[token]] if token in _ID else [_ID[c] for c in token]
    return ids
