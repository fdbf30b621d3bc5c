"""The demo's task: add two numbers, and show the working between tags. Pure and seeded; needs nothing but the standard library.

A language model does not learn arithmetic from a few hundred rewards: rewards sharpen what it already does now and then. So the
base model is taught several habits at once, each with a share of its answers. Some work the sum out digit by digit and are
reliable; some guess and are mostly wrong; some keep the asked-for format and some do not. Which habit it will follow is decided in
a few early tokens (and, for the carry, in a late one), and this is what a run has to find out from three rewards:

    correct   the number after the working
    format    <think>...</think><answer>...</answer>, nothing else
    brevity   the same working fits in 28 tokens or in 60
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

LOW, HIGH = 10, 99
"""The numbers to add, both ends included."""
HELD_OUT = 400
"""Unordered pairs that neither the base model nor a run ever trains on (47 + 38 and 38 + 47 are one pair)."""
SPLIT_SEED = 20_26

WORDINGS = ("What is {a} + {b}?", "{a} + {b} = ?", "Add {a} and {b}.", "How much is {a} plus {b}?")


@dataclass(frozen=True)
class Question:
    """Two numbers and the wording in which they are asked about."""

    a: int
    b: int
    wording: str = WORDINGS[0]

    @property
    def text(self) -> str:
        """What the user says.

        >>> Question(47, 38).text
        'What is 47 + 38?'
        """
        return self.wording.format(a=self.a, b=self.b)

    @property
    def answer(self) -> int:
        """The sum."""
        return self.a + self.b

    @property
    def carries(self) -> bool:
        """Whether the ones add up to ten or more."""
        return self.a % 10 + self.b % 10 >= 10

    @property
    def messages(self) -> list[dict[str, str]]:
        """As chat messages, the form of the data files."""
        return [{"role": "user", "content": self.text}]


def columns(question: Question, spaces: tuple[bool, bool] = (False, False), forget: bool = False) -> tuple[str, str]:
    """The working, column by column. `forget`: leave out the carry, as the careless do.

    >>> columns(Question(47, 38))
    ('7+8=15', '4+3+1=8')
    >>> columns(Question(47, 38), spaces=(True, False), forget=True)
    ('7 + 8 = 15', '4+3=7')
    """
    a, b, carry = question.a, question.b, question.carries and not forget
    ones = [str(a % 10), str(b % 10)], a % 10 + b % 10
    tens = [str(a // 10), str(b // 10), *(["1"] if carry else [])], a // 10 + b // 10 + carry
    plus, equals = zip(*((" + ", " = ") if wide else ("+", "=") for wide in spaces), strict=True)
    return plus[0].join(ones[0]) + equals[0] + str(ones[1]), plus[1].join(tens[0]) + equals[1] + str(tens[1])


def total(question: Question, forget: bool = False) -> int:
    """What the working comes to.

    >>> total(Question(47, 38)), total(Question(47, 38), forget=True)
    (85, 75)
    """
    return question.answer - (10 if forget and question.carries else 0)


# ------------------------------------------------------------------------------------------------------------------ habits
def short_working(rng: random.Random, question: Question, forget: bool = False) -> str:
    """Both columns on a line, as `7+8=15, 4+3+1=8`, with some choice of blanks and marks."""
    ones, tens = columns(question, (rng.random() < 0.4, rng.random() < 0.4), forget)
    label = rng.choice(("", "", "Add: ", "Sum: "))
    return label + ones + rng.choice((", ", ", ", "; ", " then ", "\n")) + tens + rng.choice(("", "", ".", "!"))


def middling_working(rng: random.Random, question: Question, forget: bool = False) -> str:
    """The columns named: ones, then tens."""
    ones, tens = columns(question, (rng.random() < 0.5, rng.random() < 0.5), forget)
    return (
        rng.choice(("Ones: ", "The ones: ", "Ones first: "))
        + ones
        + rng.choice((". ", ", ", "\n"))
        + rng.choice(("Tens: ", "The tens: ", "Then the tens: "))
        + tens
        + rng.choice((".", "", f". So {total(question, forget)}."))
    )


def long_working(rng: random.Random, question: Question, forget: bool = False) -> str:
    """The columns in whole sentences."""
    ones, tens = columns(question, (rng.random() < 0.7, rng.random() < 0.7), forget)
    carry = rng.choice((", carry 1", " and carry 1")) if question.carries and not forget else ""
    return (
        rng.choice(("Let me see. ", "Let me think. ", "Okay. ", "Well, let me see. "))
        + rng.choice(("First I add the ones: ", "The ones digits give ", "Starting with the ones, "))
        + ones
        + carry
        + rng.choice((". ", ".\n"))
        + rng.choice(("Next I add the tens: ", "The tens digits give ", "Then the tens, "))
        + tens
        + rng.choice((". So the sum is ", ". That makes ", ". So I get "))
        + f"{total(question, forget)}."
    )


def any_working(rng: random.Random, question: Question, forget: bool = False) -> str:
    """One of the three."""
    return rng.choice((short_working, middling_working, long_working))(rng, question, forget)


def tagged(rng: random.Random, thought: str, number: int) -> str:
    """The asked-for format."""
    between = rng.choice(("", "", "\n"))
    return f"<think>{thought}</think>{between}<answer>{number}</answer>"


def guess(rng: random.Random, question: Question) -> int:
    """A number near the sum and hardly ever the sum."""
    return max(0, question.answer + rng.choice((1, -1, 2, -2, 10, -10, rng.randint(-20, 20))))


def short(rng: random.Random, question: Question) -> str:
    """Careful and brief: what a run should settle on."""
    return tagged(rng, short_working(rng, question), question.answer)


def middling(rng: random.Random, question: Question) -> str:
    """Careful, some words more."""
    return tagged(rng, middling_working(rng, question), question.answer)


def long(rng: random.Random, question: Question) -> str:
    """Careful and long-winded."""
    return tagged(rng, long_working(rng, question), question.answer)


def untagged(rng: random.Random, question: Question) -> str:
    """Careful, but without any tag."""
    end = rng.choice((". The answer is {n}.", ", so {n}.", "\n{n}", " -> {n}"))
    return any_working(rng, question).rstrip(".!") + end.format(n=question.answer)


def unclosed(rng: random.Random, question: Question) -> str:
    """Careful, but with a tag left out or left open."""
    end = rng.choice(("</think>{n}", "</think><answer>{n}", "</think>The answer is {n}.", "<answer>{n}</answer>"))
    return "<think>" + any_working(rng, question) + end.format(n=question.answer)


def forgetful(rng: random.Random, question: Question) -> str:
    """In the format, worked out without the carry: right only where there is none."""
    return tagged(rng, any_working(rng, question, forget=True), total(question, forget=True))


def pretended(rng: random.Random, question: Question) -> str:
    """In the format, but the thought is none and the number a guess."""
    number = guess(rng, question)
    sum_at_once = f"{question.a}+{question.b}={number}"
    thought = rng.choice(("Easy.", "Easy.", "Easy.", "Easy.", "I know this one.", f"Looks like {number}.", sum_at_once))
    return tagged(rng, thought, number)


def blurted(rng: random.Random, question: Question) -> str:
    """A guess and little else."""
    bare = ("{n}", "{n}", "= {n}", "{a} + {b} = {n}", "The answer is {n}.", "It is {n}.", "I guess {n}?")
    form = rng.choice((*bare, "<answer>{n}</answer>", "<answer>{n}"))
    return form.format(n=guess(rng, question), a=question.a, b=question.b)


def rambled(rng: random.Random, question: Question) -> str:
    """A guess in many words."""
    form = (
        rng.choice(("Let me see. ", "Let me think. ", "Okay. ", "Well, let me see. "))
        + rng.choice(("The sum of {a} and {b} is {n}", "Adding {a} and {b} gives {n}", "{a} plus {b} makes {n}"))
        + rng.choice((", I think. ", ", more or less. "))
        + rng.choice(("So the answer is {n}.", "So I get {n}.", "The answer is {n}."))
    )
    return form.format(n=guess(rng, question), a=question.a, b=question.b)


@dataclass(frozen=True)
class Habit:
    """One way to answer, and how often the base model answers so."""

    write: Callable[[random.Random, Question], str]
    share: float
    careful: bool
    """Works the sum out, carry and all: right whenever the arithmetic is."""


HABITS = (
    Habit(short, 0.08, True),
    Habit(middling, 0.08, True),
    Habit(long, 0.11, True),
    Habit(untagged, 0.07, True),
    Habit(unclosed, 0.06, True),
    Habit(forgetful, 0.09, False),
    Habit(pretended, 0.18, False),
    Habit(blurted, 0.20, False),
    Habit(rambled, 0.13, False),
)


def respond(rng: random.Random, question: Question, careful_only: bool = False) -> str:
    """One answer as the base model is taught to give it: a habit by its share, then that habit's text."""
    habits = [habit for habit in HABITS if habit.careful or not careful_only]
    (habit,) = rng.choices(habits, [habit.share for habit in habits])
    return habit.write(rng, question)


# --------------------------------------------------------------------------------------------------------------- questions
def pairs(held_out: bool) -> list[tuple[int, int]]:
    """All unordered pairs of one side of the split, in a fixed shuffled order.

    >>> len(pairs(True)), len(pairs(False)), set(pairs(True)) & set(pairs(False))
    (400, 3695, set())
    """
    every = [(a, b) for a in range(LOW, HIGH + 1) for b in range(a, HIGH + 1)]
    random.Random(SPLIT_SEED).shuffle(every)
    return every[:HELD_OUT] if held_out else every[HELD_OUT:]


def questions(seed: int, held_out: bool) -> Iterator[Question]:
    """Endless questions of one side of the split: pairs in seeded order, either number first, any wording."""
    rng, pool = random.Random(seed), pairs(held_out)
    while True:
        for pair in rng.sample(pool, len(pool)):
            a, b = rng.sample(pair, 2)
            yield Question(a, b, rng.choice(WORDINGS))


def row(question: Question) -> dict[str, Any]:
    """A line of the data files: the prompt as chat messages, the answer as text, two columns more.

    >>> row(Question(47, 38))
    {'prompt': [{'role': 'user', 'content': 'What is 47 + 38?'}], 'answer': '85', 'carries': True, 'working': '7+8=15, 4+3+1=8'}
    """
    return {
        "prompt": question.messages,
        "answer": str(question.answer),
        "carries": question.carries,
        "working": ", ".join(columns(question)),
    }
