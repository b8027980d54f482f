"""Trains the byte-level BPE tokenizer and saves it as a Qwen2 tokenizer."""

import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.trainers import BpeTrainer

from labkit.tiny.facts import (
    LANGUAGES,
    cities,
    extraction,
    names,
    phrasing,
    quantities,
    stories,
    tool_data,
    topics,
)
from labkit.tiny.voice import spin, words

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, IM_START, IM_END)
# Not "special": skip_special_tokens must keep them, or the hermes parser finds no tool call.
TOOL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
VOCABULARY = 4096
# How tool calls, their results and schemas are written, so that their signs become tokens.
JSON_PIECES = (
    '{"name": "get_weather", "arguments": {"city": "", "count": 1}}', '{"result": 1}',
    '{"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}',
    '"required": ["name", "age"]}', '{"name": "", "age": 1, "date": "", "city": ""}',
    "(name: string, count: integer) ", "- ", ": ", "get_ find_ set_ send_ order_ search_ lookup_",
)  # fmt: skip
TEMPLATE = Path(__file__).parent / "chat_template.jinja"

# How Qwen2 cuts text before BPE: contractions, words with their space, single digits, signs.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# At most four Chinese characters or twelve letters a token: without the limit whole questions
# would become tokens of their own, and a new wording would look like nothing ever seen.
LONGEST_TOKEN = 12


def _patterns(section: dict) -> Iterator[str]:
    for value in section.values():
        if isinstance(value, dict):
            yield from _patterns(value)
        elif isinstance(value, str):
            yield value
        elif value and isinstance(value[0], str):
            yield from value


def _texts() -> Iterator[str]:
    """Facts and question patterns, but no names in their sentences.

    With names in place BPE would join their first character to the word before, and the model
    could not find in "我叫王" the 王 that it should repeat.
    """
    rng = random.Random(0)
    for language in LANGUAGES:
        for topic in topics(language).values():
            yield from (topic.answer, topic.short, topic.more, *topic.questions, *topic.names)
        for quantity in quantities(language):
            yield from (quantity.answer, *quantity.questions)
        yield from (sentence for stage in stories(language) for sentence in stage)
        for pattern in _patterns(phrasing(language) | extraction(language)["clauses"]):
            for _ in range(4):
                yield re.sub(r"\{\w+\}", "\n", spin(pattern, rng))
        yield from (city.name(language) for city in cities().values())
        yield from (s.name(language) for c in cities().values() for s in c.sights)
    for row in tool_data()["lab"].values():
        yield from row["description"]
    for listed in tool_data()["words"].values():
        yield from (word for line in listed for word in line.split("|"))
    for _ in range(40):
        yield from JSON_PIECES
    for section in ("en", "zh"):
        yield from (word for value in names(section).values() for word in value)
    # Often enough that each of these characters becomes a token of its own.
    for _ in range(40):
        yield from (*words("zh"), *names("zh")["surnames"], *names("zh")["given"])
    yield from (names("system")["default"], *names("system")["en"], *names("system")["zh"])


def train_tokenizer(vocabulary: int = VOCABULARY) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocabulary` tokens, the added ones last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre.Split(Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre.Sequence(
        [words, pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = ByteLevelProcessor(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL) - len(TOOL_TAGS),
        initial_alphabet=pre.ByteLevel.alphabet(),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in TOOL_TAGS])
    return tokenizer


def _settings(tokenizer: Tokenizer, longest: int) -> dict:
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": token in SPECIAL,
        }
        for token in SPECIAL + TOOL_TAGS
    }  # fmt: skip
    return {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": added,
        "additional_special_tokens": [IM_START, IM_END], "bos_token": None,
        "clean_up_tokenization_spaces": False, "eos_token": IM_END, "errors": "replace",
        "model_max_length": longest, "pad_token": END_OF_TEXT, "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip


def save_tokenizer(tokenizer: Tokenizer, folder: Path, longest: int = 2048) -> None:
    """Writes tokenizer.json, vocab.json, merges.txt, tokenizer_config.json and the template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    text = json.dumps(_settings(tokenizer, longest), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    shutil.copyfile(TEMPLATE, folder / "chat_template.jinja")
