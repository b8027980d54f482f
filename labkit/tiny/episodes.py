"""The skills, each as short runs of turns: lab questions, city guide, memory, long output."""

import zlib
from collections.abc import Callable

from labkit.tiny.facts import City, Sight, Topic, cities, names, stories, topics
from labkit.tiny.voice import Voice

Turn = tuple[str, str]  # what the user says, what the assistant answers
SMALL_TALK = ("hello", "how_are_you", "thanks", "goodbye")


def lab_question(voice: Voice, topic: Topic) -> str:
    """One way to ask about a topic."""
    if voice.unseen and (not topic.names or voice.rng.random() < 0.5):
        return topic.unseen
    if not voice.unseen and (not topic.names or voice.rng.random() < 0.5):
        question = voice.rng.choice(topic.questions)
        return question if topic.key in SMALL_TALK else voice.reword(question)
    return voice.ask(voice.phrases[topic.kind], n=voice.rng.choice(topic.names))


def lab_turn(voice: Voice, topic: Topic) -> Turn:
    """A question about the lab with its full or one-sentence answer."""
    question = lab_question(voice, topic)
    if topic.key in SMALL_TALK:
        return question, topic.answer
    if voice.rng.random() < 0.12:
        return voice.ask(voice.phrases["one_sentence"], q=question), topic.short
    return voice.casual(question), topic.answer


def lab(voice: Voice) -> list[Turn]:
    """A lab question, sometimes followed by a wish for a shorter or a translated answer."""
    topic = voice.rng.choice(list(topics(voice.language).values()))
    turns = [lab_turn(voice, topic)]
    draw = voice.rng.random()
    if turns[0][1] == topic.short or topic.key in SMALL_TALK or draw > 0.2:
        return turns
    if draw < 0.1:
        return [*turns, (voice.ask(voice.phrases["shorter"]), topic.short)]
    other = topics("zh" if voice.language == "en" else "en")[topic.key]
    return [*turns, (voice.ask(voice.phrases["translate"]), other.answer)]


def sights_reply(voice: Voice, city: City) -> str:
    """A numbered list of the city's sights with a remark each."""
    guide, remark = voice.phrases["guide"], voice.phrases["remark"]
    lines = [guide["list"].format(c=city.name(voice.language))]
    lines += [
        guide["item"].format(i=i, s=sight.name(voice.language), remark=remark[sight.kind])
        for i, sight in enumerate(city.sights, 1)
    ]
    return "\n".join(lines)


def fee_reply(voice: Voice, sight: Sight) -> str:
    """Whether the sight costs anything."""
    key = "baiyun" if sight.zh == "白云山" else sight.fee
    return voice.phrases["guide"][key].format(s=sight.name(voice.language))


def about_reply(voice: Voice, city: City, sight: Sight) -> str:
    """Where a sight is and why one goes there."""
    return voice.phrases["guide"]["about"].format(
        s=sight.name(voice.language), c=city.name(voice.language),
        remark=voice.phrases["remark"][sight.kind],
    )  # fmt: skip


def _spoken(voice: Voice, sight: Sight) -> str:
    article = voice.language == "en" and voice.rng.random() < 0.3
    return ("the " if article else "") + sight.name(voice.language)


def _by_kind(voice: Voice, city: City, apart_from: Sight) -> tuple[str, Sight] | None:
    """A sight that "the tower" or "the park" means in this city without doubt."""
    kinds = [sight.kind for sight in city.sights]
    fitting = [
        sight for sight in city.sights
        if sight != apart_from and kinds.count(sight.kind) == 1
        and sight.kind in voice.phrases["kind"]
    ]  # fmt: skip
    if not fitting:
        return None
    sight = voice.rng.choice(fitting)
    return voice.phrases["kind"][sight.kind], sight


def sight_turns(voice: Voice, city: City) -> list[Turn]:
    """A question about one sight, then perhaps its price, then perhaps another sight."""
    sight = voice.rng.choice(city.sights)
    fee_first = voice.rng.random() < 0.6
    section, reply = ("fee", fee_reply(voice, sight))
    if not fee_first:
        section, reply = ("about", about_reply(voice, city, sight))
    turns = [(voice.casual(voice.ask(voice.phrases[section], s=_spoken(voice, sight))), reply)]
    if not fee_first and voice.rng.random() < 0.65:
        turns.append((voice.ask(voice.phrases["fee"], "it"), fee_reply(voice, sight)))
    if voice.rng.random() < 0.65:
        turns += _also(voice, city, sight, turns[-1][1] == fee_reply(voice, sight))
    return turns


def _also(voice: Voice, city: City, sight: Sight, about_fee: bool) -> list[Turn]:
    """ "And the tower?": the same question as before, for another sight."""
    named = _by_kind(voice, city, sight) if voice.rng.random() < 0.6 else None
    if named is None:
        other = voice.rng.choice([s for s in city.sights if s != sight])
        named = _spoken(voice, other), other
    spoken, other = named
    reply = fee_reply(voice, other) if about_fee else about_reply(voice, city, other)
    return [(voice.ask(voice.phrases["also"], s=spoken), reply)]


def city_guide(voice: Voice) -> list[Turn]:
    """The sights of a city with follow-ups that only the history explains."""
    city = voice.rng.choice(list(cities().values()))
    question = voice.ask(voice.phrases["cities"], c=city.name(voice.language))
    turns = [(voice.casual(question), sights_reply(voice, city))]
    draw = voice.rng.random()
    if draw < 0.1:
        return sight_turns(voice, city)[:1]
    if draw < 0.15:
        return [_unknown_city(voice)]
    if draw < 0.85:
        turns += sight_turns(voice, city)
    if voice.rng.random() < 0.35:
        best = voice.phrases["guide"]["kids"].format(s=city.for_children().name(voice.language))
        turns.append((voice.ask(voice.phrases["kids"]), best))
    return turns


def _unknown_city(voice: Voice) -> Turn:
    place = voice.value("home")
    question = voice.ask(voice.phrases["cities"], c=place)
    return question, voice.phrases["guide"]["unknown"].format(c=place)


def tell(voice: Voice, kind: str, value: str) -> Turn:
    """The user tells something about themselves."""
    section = voice.phrases["memory"][kind]
    return voice.ask(section, "tell", v=value), section["ack"].format(v=value)


def recall(voice: Voice, kind: str, value: str | None) -> Turn:
    """The user asks it back; `value` None means that it was never told."""
    section = voice.phrases["memory"][kind]
    reply = section["missing"] if value is None else section["reply"].format(v=value)
    return voice.casual(voice.ask(section, "ask")), reply


def memory(voice: Voice, distract: Callable[[Voice], list[Turn]] | None = None) -> list[Turn]:
    """Tells one to three facts, talks of other things, and asks for the facts."""
    distract = distract or distraction
    kinds = voice.rng.sample(list(voice.phrases["memory"]), k=voice.rng.choice((1, 1, 2, 3)))
    told = {kind: voice.value(kind) for kind in kinds}
    turns = []
    for kind, value in told.items():
        said = tell(voice, kind, value)
        if turns and voice.rng.random() < 0.25:  # in one breath with what came before
            first = turns.pop()
            space = " " if voice.language == "en" else ""
            said = (first[0] + space + said[0], first[1] + space + said[1])
        turns.append(said)
        if voice.rng.random() < 0.25:
            turns += distract(voice)
    for _ in range(voice.rng.choice((0, 0, 0, 1, 2))):
        turns += distract(voice)
    for kind in voice.rng.sample(kinds, k=voice.rng.randint(1, len(kinds))):
        turns.append(recall(voice, kind, told[kind]))
    if voice.rng.random() < 0.12:
        kind = voice.rng.choice([k for k in voice.phrases["memory"] if k not in told])
        turns.append(recall(voice, kind, None))
    return turns


def distraction(voice: Voice) -> list[Turn]:
    """One turn about something else."""
    skill = voice.rng.choice((lab, lab, city_guide, unknown))
    return skill(voice)[:1]


def missing(voice: Voice) -> list[Turn]:
    """Asks back what was never told."""
    return [recall(voice, voice.rng.choice(list(voice.phrases["memory"])), None)]


def unknown(voice: Voice) -> list[Turn]:
    """A question outside the model's small world."""
    section = voice.phrases["unknown"]
    thing = voice.rng.choice(section["things_unseen" if voice.unseen else "things"])
    key = "about" if not voice.unseen and voice.rng.random() < 0.8 else "train"
    return [(voice.casual(voice.ask(section, key, x=thing)), section["answer"])]


def counted(start: int, end: int) -> str:
    """The numbers from start to end, both included."""
    return ", ".join(str(n) for n in range(start, end + 1)) + "."


def count(voice: Voice) -> list[Turn]:
    """Counting, the simplest reply of a length that one can choose."""
    span = voice.rng.choice(((3, 30), (3, 30), (31, 60), (50, 50), (61, 100), (101, 150)))
    end = voice.rng.randint(*span)
    start = 1 if voice.rng.random() < 0.8 else voice.rng.randint(1, end)
    key = "to" if start == 1 and not voice.unseen and voice.rng.random() < 0.25 else "train"
    return [(voice.ask(voice.phrases["count"], key, a=start, b=end), counted(start, end))]


def repeat(voice: Voice) -> list[Turn]:
    """Copies a few words, which teaches the model to look back."""
    text = voice.copy_text()
    return [(voice.ask(voice.phrases["repeat"], w=text), text)]


def told_story(language: str, hero: str) -> str:
    """The one story about that hero: listed heroes have their own mix, all others share one."""
    listed = hero in names(language)["heroes"]
    key = hero if listed else names(language)["hero"]
    sentences = [
        variants[zlib.crc32(f"{key}{stage}".encode()) % len(variants)]
        for stage, variants in enumerate(stories(language))
    ]
    return (" " if language == "en" else "").join(sentences).format(h=hero)


def story(voice: Voice) -> list[Turn]:
    """A story of some 250 tokens, about a hero or about nobody in particular."""
    section = voice.phrases["story"]
    if voice.rng.random() < 0.4 and not voice.unseen:
        return [(voice.ask(section, "plain"), told_story(voice.language, voice.words["hero"]))]
    hero = voice.person() if voice.rng.random() < 0.3 else voice.rng.choice(voice.words["heroes"])
    return [(voice.ask(section, h=hero), told_story(voice.language, hero))]
