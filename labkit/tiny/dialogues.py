"""The dialogue generator: the dialogue of a given seed and number is always the same."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count as count_up

from labkit.tiny import episodes
from labkit.tiny.facts import LANGUAGES, names
from labkit.tiny.voice import Voice

# How often each skill opens an episode, in percent.
MIX = {
    "lab": 33, "city_guide": 20, "memory": 26, "missing": 2, "unknown": 5,
    "count": 4, "repeat": 7, "story": 3,
}  # fmt: skip
MOST_TURNS = 8


@dataclass(frozen=True)
class Dialogue:
    """A conversation as chat messages; `skills` names its episodes in order."""

    messages: tuple[dict[str, str], ...]
    skills: tuple[str, ...]
    language: str


def _system(rng: random.Random, language: str) -> str | None:
    """Mostly the default, often another one, sometimes none at all."""
    draw = rng.random()
    if draw < 0.5:
        return names("system")["default"]
    if draw < 0.7:
        return None
    return rng.choice(names("system")[language if rng.random() < 0.8 else "en"])


def _skills(rng: random.Random) -> list[str]:
    chosen = rng.choices(list(MIX), weights=MIX.values(), k=rng.choice((1, 1, 1, 2, 2, 3)))
    # Two memories in one conversation could contradict each other.
    kept = [s for i, s in enumerate(chosen) if s not in ("memory", "missing") or i == 0]
    return kept


def dialogue(seed: int, number: int) -> Dialogue:
    """The training dialogue with that number, in English if it is even and Chinese if odd."""
    rng = random.Random(f"{seed}:{number}")
    language = LANGUAGES[number % 2]
    turns, skills = [], _skills(rng)
    for i, skill in enumerate(skills):
        switch = i > 0 and rng.random() < 0.15
        spoken = LANGUAGES[(number + switch) % 2]
        turns += getattr(episodes, skill)(Voice(rng, spoken))
    return Dialogue(_messages(_system(rng, language), turns[:MOST_TURNS]), tuple(skills), language)


def _messages(system: str | None, turns: list[episodes.Turn]) -> tuple[dict[str, str], ...]:
    messages = [{"role": "system", "content": system}] if system else []
    for user, assistant in turns:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    return tuple(messages)


def stream(seed: int, start: int = 0) -> Iterator[Dialogue]:
    """All dialogues of a seed from number `start` on, without end."""
    return (dialogue(seed, number) for number in count_up(start))


def held_out(seed: int, number: int) -> Dialogue:
    """A one-episode dialogue made only of phrasings, names and values that training never shows."""
    rng = random.Random(f"held-out:{seed}:{number}")
    language = LANGUAGES[number % 2]
    skill = list(MIX)[number // 2 % len(MIX)]
    turns = getattr(episodes, skill)(Voice(rng, language, unseen=True))
    return Dialogue(_messages(names("system")["default"], turns[:MOST_TURNS]), (skill,), language)
