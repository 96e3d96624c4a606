"""The demo's conversations: a few hundred short questions with one right answer each, always the same; no download.

Colours of things, sums, and words to repeat. A question that is held out has relatives in training: the same sum asked
otherwise, the same thing, the same words in other company. So a model must answer it and cannot have read it.
"""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import orjson

from modalities import pbin

HELD_OUT_SHARE = 0.1
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
END = SPECIAL[0]

THINGS = {
    "sky": "blue", "sea": "blue", "grass": "green", "frog": "green", "lime": "green", "sun": "yellow",
    "lemon": "yellow", "canary": "yellow", "snow": "white", "milk": "white", "swan": "white", "coal": "black",
    "raven": "black", "night": "black", "blood": "red", "ruby": "red", "cherry": "red", "carrot": "orange",
    "pumpkin": "orange", "plum": "purple",
}  # fmt: skip
COLOUR_QUESTIONS = ("What colour is the {}?", "Which colour has the {}?", "Tell me the colour of the {}.")
SUM_QUESTIONS = ("What is {} + {}?", "Add {} and {}.", "How much is {} plus {}?")
WORDS = (
    "lamp", "river", "stone", "bread", "cloud", "horse", "paper", "music", "glass", "winter", "garden", "silver",
    "bridge", "candle", "island", "mirror",
)  # fmt: skip


def conversations() -> Iterator[tuple[str, str]]:
    """All (question, answer)."""
    for (thing, colour), question in itertools.product(THINGS.items(), COLOUR_QUESTIONS):
        yield question.format(thing), f"The {thing} is {colour}."
    for a, b, question in itertools.product(range(10), range(10), SUM_QUESTIONS):
        yield question.format(a, b), f"It is {a + b}."
    for one, other in itertools.permutations(WORDS, 2):
        yield f"Repeat {one} {other}.", f"{one} {other}."


def is_held_out(question: str) -> bool:
    """About one question in ten, the same ones on every machine."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") < HELD_OUT_SHARE * 2**64


def write_conversations(out: Path, held_out: bool) -> None:
    """Write the conversations for training, or those held out, as JSONL that `prep.py chat` reads."""
    with pbin.write_beside(out) as file:
        for question, answer in conversations():
            if is_held_out(question) == held_out:
                turns = (("user", question), ("assistant", answer))
                messages = [{"role": role, "content": content} for role, content in turns]
                file.write(orjson.dumps({"messages": messages}) + b"\n")


def write_template(out: Path) -> None:
    with pbin.write_beside(out) as file:
        file.write(TEMPLATE.encode())


def prompt(question: str) -> str:
    """The template's text up to where the assistant speaks."""
    return f"<|user|>{question}{END}<|assistant|>"
