"""The dialogue generator: deterministic, balanced, and blind to what is held out."""

import random
import re
from itertools import islice

import pytest

from labkit.tiny import episodes
from labkit.tiny.cases import all_cases, says_fee
from labkit.tiny.dialogues import MOST_TURNS, dialogue, held_out, stream
from labkit.tiny.facts import LANGUAGES, cities, names, phrasing, topics
from labkit.tiny.voice import Voice, is_held_out

SAMPLE = 4000


@pytest.fixture(scope="module")
def sample():
    return list(islice(stream(seed=1), SAMPLE))


def said(talks, role):
    return [m["content"] for talk in talks for m in talk.messages if m["role"] == role]


def test_same_seed_same_dialogue():
    assert dialogue(3, 17) == dialogue(3, 17)
    assert dialogue(3, 17) != dialogue(4, 17)


def test_stream_can_start_anywhere():
    assert next(stream(1, start=500)) == dialogue(1, 500)


def test_languages_are_balanced(sample):
    chinese = sum(bool(re.search(r"[\u4e00-\u9fff]", text)) for text in said(sample, "assistant"))
    assert 0.45 < chinese / len(said(sample, "assistant")) < 0.55


def test_every_skill_is_there(sample):
    skills = {skill for talk in sample for skill in talk.skills}
    assert skills == {"lab", "city_guide", "memory", "missing", "unknown", "count", "repeat",
                      "story"}  # fmt: skip


def test_roles_alternate_and_stay_short(sample):
    for talk in sample:
        roles = [m["role"] for m in talk.messages if m["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert 1 <= len(roles) // 2 <= MOST_TURNS


def test_some_dialogues_have_no_system_prompt(sample):
    without = sum(talk.messages[0]["role"] != "system" for talk in sample)
    assert 0.1 < without / SAMPLE < 0.4


def test_topics_are_the_same_in_both_languages():
    assert topics("en").keys() == topics("zh").keys()
    assert len(topics("en")) >= 45


def test_cities_have_sights_and_one_for_children():
    assert len(cities()) >= 30
    for city in cities().values():
        assert 3 <= len(city.sights) <= 5
        assert city.for_children() in city.sights


def test_held_out_questions_never_in_training(sample):
    asked = "\n".join(said(sample, "user")).lower()
    for language in LANGUAGES:
        for topic in topics(language).values():
            assert topic.unseen not in topic.questions
            assert topic.unseen.rstrip("?？").lower() not in asked, topic.unseen


def as_regex(pattern):
    return ".+".join(map(re.escape, re.split(r"\{\w+\}", pattern.rstrip("?？.。！"))))


@pytest.mark.parametrize("language", LANGUAGES)
def test_held_out_patterns_never_in_training(sample, language):
    asked = "\n".join(said(sample, "user"))
    sections = {k: v for k, v in phrasing(language).items() if k not in ("guide", "remark", "kind")}
    sections |= {f"memory.{k}": v for k, v in sections.pop("memory").items()}
    for section, keys in sections.items():
        for unseen, seen in (("unseen", "train"), ("tell_unseen", "tell"), ("ask_unseen", "ask")):
            for pattern in keys.get(unseen, ()):
                assert pattern not in keys[seen], (section, pattern)
                assert not re.search(as_regex(pattern), asked, flags=re.I), (section, pattern)


def test_held_out_names_never_in_training(sample):
    text = "\n".join(said(sample, "user"))
    for name in names("en")["people_unseen"] + names("zh")["people_unseen"]:
        assert name not in text
    for system in names("system")["unseen"]:
        assert system not in said(sample, "system")


@pytest.mark.parametrize("unseen", [False, True])
def test_made_up_names_keep_to_their_side(unseen):
    voice = Voice(random.Random(0), "en", unseen)
    assert all(is_held_out(voice.made_up()) is unseen for _ in range(300))


def test_held_out_dialogues_differ_from_training(sample):
    seen = [talk.messages for talk in sample]
    assert not any(held_out(1, number).messages in seen for number in range(100))


@pytest.mark.parametrize("language", LANGUAGES)
def test_memory_replies_carry_what_was_told(language):
    for number in range(200):
        voice = Voice(random.Random(number), language)
        turns = episodes.memory(voice)
        section = voice.phrases["memory"]
        patterns = [re.escape(s["reply"]).replace(r"\{v\}", "(.+)") for s in section.values()]
        for position, (_, reply) in enumerate(turns):
            for pattern in patterns:
                if found := re.fullmatch(pattern, reply):
                    assert any(found[1] in user for user, _ in turns[:position])


def test_the_articles_own_question():
    voice = Voice(random.Random(0), "zh")
    guangzhou = cities()["guangzhou"]
    reply = episodes.sights_reply(voice, guangzhou)
    assert all(sight in reply for sight in ("白云山", "广州塔", "陈家祠", "沙面", "越秀公园"))
    fee = episodes.fee_reply(voice, guangzhou.sights[0])
    assert "5 元" in fee and says_fee(fee, guangzhou.sights[0], "zh")


def test_counting_and_stories_are_exact():
    assert episodes.counted(3, 6) == "3, 4, 5, 6."
    assert episodes.told_story("en", "a fox") == episodes.told_story("en", "a fox")
    assert "a fox" in episodes.told_story("en", "a fox")


def test_cases_are_deterministic():
    one, two = list(all_cases(6)), list(all_cases(6))
    assert [case.messages for case in one] == [case.messages for case in two]
    assert {case.language for case in one} == set(LANGUAGES)
