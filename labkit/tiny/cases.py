"""Evaluation cases, each a conversation and a test of what the reply means."""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from labkit.tiny import episodes
from labkit.tiny.facts import LANGUAGES, City, Sight, cities, topics
from labkit.tiny.voice import Voice

ALIKE = 0.6  # share of two-character pieces that a right answer has in common with the known one


@dataclass(frozen=True)
class Case:
    """Messages to send and whether a reply is right."""

    skill: str
    language: str
    messages: list[dict[str, str]]
    right: Callable[[str], bool]


def _pieces(text: str) -> set[str]:
    return {text[i : i + 2] for i in range(len(text) - 1)}


def likeness(one: str, other: str) -> float:
    """Shared two-character pieces over all pieces, 0 to 1."""
    a, b = _pieces(one), _pieces(other)
    return len(a & b) / max(1, len(a | b))


def about_topic(reply: str, key: str, language: str) -> bool:
    """True if of all answers known the reply is nearest to that topic's, and close to it."""
    scores = {
        k: max(likeness(reply, t.answer), likeness(reply, t.short))
        for k, t in topics(language).items()
    }
    return max(scores, key=scores.get) == key and scores[key] >= ALIKE


def lists_sights(reply: str, city: City, language: str) -> bool:
    """True if at least three sights of the city are named and none of another city."""
    own = [sight.name(language) for sight in city.sights]
    found = sum(name in reply for name in own)
    line_names = re.findall(r"^\d+\. (.+?)[:：]", reply, flags=re.M)
    return found >= 3 and all(name in own for name in line_names)


def says_fee(reply: str, sight: Sight, language: str) -> bool:
    """True if the reply names the sight and says rightly whether it costs anything."""
    free = ("free" in reply) if language == "en" else ("免费" in reply)
    named = sight.name(language) in reply
    return named and free == (sight.fee == "free")


def numbers(reply: str) -> list[int]:
    """All whole numbers of a reply in order."""
    return [int(n) for n in re.findall(r"\d+", reply)]


def _talk(turns: list[episodes.Turn], question: str) -> list[dict[str, str]]:
    messages = []
    for user, assistant in turns:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    return [*messages, {"role": "user", "content": question}]


def _lab(voice: Voice, number: int) -> Case:
    keys = list(topics(voice.language))
    topic = topics(voice.language)[keys[number % len(keys)]]
    question = episodes.lab_question(voice, topic)
    skill = "lab, new wording" if voice.unseen else "lab, trained wording"

    def right(reply: str) -> bool:
        return about_topic(reply, topic.key, topic.language)

    return Case(skill, voice.language, _talk([], question), right)


def _city(voice: Voice, number: int) -> Case:
    city = list(cities().values())[number % len(cities())]
    question = voice.ask(voice.phrases["cities"], c=city.name(voice.language))

    def right(reply: str) -> bool:
        return lists_sights(reply, city, voice.language)

    return Case("city sights", voice.language, _talk([], question), right)


def _follow_up(voice: Voice, number: int) -> Case:
    """Price of a named sight, of "it", of "the tower", or the place for children."""
    city = list(cities().values())[number % len(cities())]
    sight = voice.rng.choice(city.sights)
    asked = voice.ask(voice.phrases["cities"], c=city.name(voice.language))
    turns = [(asked, episodes.sights_reply(voice, city))]
    way = voice.rng.choice(("fee", "it", "also", "kids"))
    if way == "kids":
        question, sight = voice.ask(voice.phrases["kids"]), city.for_children()
        name = sight.name(voice.language)
        return Case("city follow-up", voice.language, _talk(turns, question), lambda r: name in r)
    section = voice.phrases["about" if way == "it" else "fee"]
    named = voice.ask(section, s=sight.name(voice.language))
    if way == "it":
        turns.append((named, episodes.about_reply(voice, city, sight)))
        named = voice.ask(voice.phrases["fee"], "it")
    if way == "also":
        turns.append((named, episodes.fee_reply(voice, sight)))
        sight = voice.rng.choice([s for s in city.sights if s != sight])
        named = voice.ask(voice.phrases["also"], s=sight.name(voice.language))

    def right(reply: str) -> bool:
        return says_fee(reply, sight, voice.language)

    return Case("city follow-up", voice.language, _talk(turns, named), right)


def _memory(voice: Voice, number: int) -> Case:
    """One or two facts told, up to three other turns, then one of them asked back."""
    kinds = voice.rng.sample(list(voice.phrases["memory"]), k=voice.rng.choice((1, 2)))
    told = {kind: voice.value(kind) for kind in kinds}
    turns = [episodes.tell(voice, kind, value) for kind, value in told.items()]
    for _ in range(number // 2 % 4):
        turns += episodes.distraction(voice)
    kind = voice.rng.choice(kinds)
    question = voice.ask(voice.phrases["memory"][kind], "ask")
    value = told[kind]
    return Case("memory", voice.language, _talk(turns, question), lambda r: value in r)


def _count(voice: Voice, number: int) -> Case:
    end = voice.rng.randint(20, 150)
    question = voice.ask(voice.phrases["count"], a=1, b=end)
    wanted = list(range(1, end + 1))
    return Case("counting", voice.language, _talk([], question), lambda r: numbers(r) == wanted)


def _story(voice: Voice, number: int) -> Case:
    question = episodes.story(voice)[0][0]
    least = 600 if voice.language == "en" else 250
    return Case("story", voice.language, _talk([], question), lambda r: len(r) >= least)


def _unknown(voice: Voice, number: int) -> Case:
    question, answer = episodes.unknown(voice)[0]
    return Case("does not know", voice.language, _talk([], question),
                lambda r: likeness(r, answer) >= ALIKE)  # fmt: skip


# Skill: how to make a case, whether its wording is held out.
MAKERS = (
    (_lab, False), (_lab, True), (_city, True), (_follow_up, True), (_memory, True),
    (_count, True), (_story, True), (_unknown, True),
)  # fmt: skip


def all_cases(per_skill: int, seed: int = 7) -> Iterator[Case]:
    """That many cases of each skill, half of them in Chinese, always the same for a seed."""
    for make, unseen in MAKERS:
        for number in range(per_skill):
            rng = random.Random(f"cases:{seed}:{make.__name__}:{unseen}:{number}")
            language = LANGUAGES[number % 2]
            yield make(Voice(rng, language, unseen), number // 2)
