"""Questions and answers about made-up places, from a seed: what small models are pretrained on.

Standard library only.  ``unseen_questions`` are about places that the pretraining text never
mentions, which a finetune job can then teach.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_ONSETS = "b br d dr f g gr h k kl l m n p pr r s sh t th tr v z"
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "o", "a", "e"]
_CODAS = ["", "", "", "n", "r", "l", "s", "m", "nd", "x"]
_WORDS = {
    "color": "red, blue, green, yellow, white, black, purple, orange, silver, golden, brown, pink",
    "animal": "fox, owl, bear, wolf, horse, eagle, otter, crane, tiger, goat, whale, raven, lynx, heron",
    "food": "plum bread, fried rice, apple soup, smoked fish, honey cake, bean stew, corn pie, mint tea",
}
_TITLES = ("Queen", "King", "President", "Duke", "Captain", "Doctor")
_SYSTEM = "You are a helpful assistant. Answer in one short sentence."

Message = dict[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True, slots=True)
class Relation:
    """One kind of fact: how it is asked, how it is answered, and what kind of value it has."""

    questions: tuple[str, ...]
    answer: str
    kind: str


RELATIONS = (
    Relation(
        ("What is the capital of {x}?", "Which city is the capital of {x}?"),
        "The capital of {x} is {v}.",
        "name",
    ),
    Relation(("Who rules {x}?", "Who is the ruler of {x}?"), "{x} is ruled by {v}.", "person"),
    Relation(
        ("What color is the flag of {x}?", "Which color is on the flag of {x}?"),
        "The flag of {x} is {v}.",
        "color",
    ),
    Relation(
        ("What is the national animal of {x}?", "Which animal stands for {x}?"),
        "The national animal of {x} is the {v}.",
        "animal",
    ),
    Relation(("What do people eat in {x}?", "What is eaten in {x}?"), "People in {x} eat {v}.", "food"),
    Relation(("Which river flows through {x}?",), "The river {v} flows through {x}.", "name"),
    Relation(("When was {x} founded?", "In which year was {x} founded?"), "{x} was founded in {v}.", "year"),
    Relation(("How many people live in {x}?",), "About {v} people live in {x}.", "count"),
)


@dataclass(frozen=True, slots=True)
class Fact:
    question: str
    answer: str
    plain: str  # the same as running text


def _word(rng: random.Random, syllables: int) -> str:
    parts = [rng.choice(_ONSETS.split()) + rng.choice(_VOWELS) for _ in range(syllables)]
    return ("".join(parts) + rng.choice(_CODAS)).capitalize()


def _value(rng: random.Random, kind: str) -> str:
    if kind == "name":
        return _word(rng, 2)
    if kind == "person":
        return f"{rng.choice(_TITLES)} {_word(rng, 2)}"
    if kind == "year":
        return str(rng.randint(400, 1990))
    if kind == "count":
        return f"{rng.randint(2, 90)} thousand"
    return rng.choice(_WORDS[kind].split(", "))


class ToyFacts:
    """``places`` made-up places with one value for each relation; a pure function of the seed."""

    def __init__(self, seed: int, places: int = 160) -> None:
        rng = random.Random(f"toy-world-{seed}")
        names: dict[str, None] = {}
        while len(names) < places + 64:
            names[_word(rng, rng.choice((2, 2, 3)))] = None
        self.places = list(names)[:places]
        self.unseen_places = list(names)[places:]
        self._values = {(x, r): _value(rng, rel.kind) for x in names for r, rel in enumerate(RELATIONS)}

    def fact(self, place: str, relation: int, wording: int = 0) -> Fact:
        rel = RELATIONS[relation]
        answer = rel.answer.format(x=place, v=self._values[place, relation])
        return Fact(rel.questions[wording % len(rel.questions)].format(x=place), answer, answer)

    def conversation(self, rng: random.Random) -> list[Message]:
        """One to three questions with their answers; sometimes with a system message first."""
        messages = [{"role": "system", "content": _SYSTEM}] if rng.random() < 0.1 else []
        for _ in range(rng.choice((1, 1, 1, 2))):
            fact = self.fact(rng.choice(self.places), rng.randrange(len(RELATIONS)), rng.randrange(4))
            messages.append({"role": "user", "content": fact.question})
            messages.append({"role": "assistant", "content": fact.answer})
        return messages

    def paragraph(self, rng: random.Random) -> str:
        """Two or three facts as running text."""
        place = rng.choice(self.places)
        kinds = rng.sample(range(len(RELATIONS)), rng.choice((2, 3)))
        return " ".join(self.fact(place, r).plain for r in kinds)

    def lines(self, count: int, seed: int = 0) -> list[str]:
        """Text for a tokenizer to learn from."""
        rng = random.Random(f"toy-lines-{seed}")
        out = [_SYSTEM]
        for _ in range(count):
            out += [m["content"] for m in self.conversation(rng)]
            out.append(self.paragraph(rng))
        return out

    def unseen_facts(self, count: int) -> list[Fact]:
        """Facts about places that pretraining never mentions; ValueError: more than there are."""
        if count > len(self.unseen_places):
            raise ValueError(f"{count} unseen facts asked for; there are {len(self.unseen_places)} places")
        return [self.fact(x, i % len(RELATIONS)) for i, x in enumerate(self.unseen_places[:count])]
