"""nano-audio's tokenizer: official ids for what the official code knows by number."""

from __future__ import annotations

import json

from tokenizers import Tokenizer

from lfm2_audio.nano_data import files, tokenizer, word_tokens
from lfm2_audio.speech.sentences import lexicon
from lfm2_audio.speech.tokenizer import SPECIAL_TOKENS, VOCABULARY, tokenizer_files


def test_special_tokens_stand_where_the_official_code_expects_them() -> None:
    known = {
        0: "<|pad|>",
        1: "<|startoftext|>",
        6: "<|im_start|>",
        7: "<|im_end|>",
        128: "<|audio_start|>",
        130: "<|text_end|>",
    }
    for number, token in known.items():
        assert SPECIAL_TOKENS[number] == token
        assert tokenizer().token_to_id(token) == number
    assert tokenizer().get_vocab_size() == VOCABULARY


def test_every_word_is_one_token() -> None:
    assert len(set(word_tokens())) == len(lexicon())
    for word in lexicon():
        assert len(tokenizer().encode(word, add_special_tokens=False).ids) == 1, word


def test_any_text_survives() -> None:
    for text in ("what is seven plus two", "Ähm, 42 €?", "<|im_end|> x"):
        ids = tokenizer().encode(text, add_special_tokens=False).ids
        assert tokenizer().decode(ids, skip_special_tokens=False) == text


def test_the_same_bytes_each_time() -> None:
    assert tokenizer_files() == files()


def test_the_files() -> None:
    made = files()
    assert sorted(made) == [
        "chat_template.jinja",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads(made["tokenizer_config.json"])["eos_token"] == "<|im_end|>"
    assert Tokenizer.from_str(made["tokenizer.json"]).encode("hello").ids[0] == 1
