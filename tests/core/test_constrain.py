"""Constrained answers match their schema or pattern whatever the logits say."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import llguidance.hf
import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lfm2_mm import constrain
from lfm2_mm.constrain import Constraint, Grammar, from_response_format
from lfm2_mm.errors import ConstraintError
from lfm2_mm.tokenizer import Tokenizer

PADDED = 384  # ids of the model, more than the tokenizer has


def build() -> Tokenizer:
    """A byte-level BPE with a few merges and the special tokens of LFM2."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|pad|>", "<|startoftext|>", "<|im_end|>", "<image>"],
        show_progress=False,
    )
    raw.train_from_iterator(['{"name": "ada", "age": 12} true false null'] * 3, trainer)
    made: Any = PreTrainedTokenizerFast
    hf = made(tokenizer_object=raw, eos_token="<|im_end|>")
    return Tokenizer(hf)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build()


def end_of(tokenizer: Tokenizer) -> int:
    assert tokenizer.eos_id is not None
    return tokenizer.eos_id


def start(constraint: Constraint, tokenizer: Tokenizer) -> Grammar:
    return constrain.compile_constraint(constraint, tokenizer, vocab_size=PADDED)


def feed(grammar: Grammar, tokenizer: Tokenizer, text: str) -> None:
    for token in tokenizer.encode(text):
        grammar.accept(token)


def answer(grammar: Grammar, tokenizer: Tokenizer, seed: int) -> str:
    """Follow random logits, leaning towards the end of strings, lists and the answer."""
    generator = torch.Generator().manual_seed(seed)
    lean = torch.zeros(PADDED)
    for mark in '"}]':
        lean[tokenizer.hf.convert_tokens_to_ids(mark)] = 2.5
    lean[end_of(tokenizer)] = 2.5
    lean[len(tokenizer.hf) :] = 50.0  # ids without a token: masked or else chosen
    lean[3] = 50.0  # <image>: never text
    ids: list[int] = []
    for _ in range(2000):
        logits = torch.randn(PADDED, generator=generator) + lean
        mask = grammar.allowed()
        assert mask.shape == (PADDED,)
        assert mask.dtype == torch.bool
        token = int(logits.masked_fill(~mask, -torch.inf).argmax())
        grammar.accept(token)
        if token == tokenizer.eos_id:
            assert grammar.finished
            return str(tokenizer.hf.decode(ids))
        ids.append(token)
    raise AssertionError("no end after 2000 tokens")


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "colour": {"enum": ["red", "green"]},
        "box": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4},
        "note": {"type": ["string", "null"]},
    },
    "required": ["name", "age", "colour", "box"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(6))
def test_random_logits_under_a_schema_give_valid_json(tokenizer: Tokenizer, seed: int) -> None:
    schema = SCHEMA if seed % 2 else json.dumps(SCHEMA)
    value = json.loads(answer(start(Constraint.json_schema(schema), tokenizer), tokenizer, seed))
    assert set(value) - {"note"} == {"name", "age", "colour", "box"}
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 12
    assert type(value["age"]) is int
    assert 0 <= value["age"] <= 150
    assert value["colour"] in ("red", "green")
    assert 2 <= len(value["box"]) <= 4
    assert all(type(n) in (int, float) for n in value["box"])
    assert value.get("note") is None or isinstance(value["note"], str)


def test_any_object(tokenizer: Tokenizer) -> None:
    for seed in range(3):
        text = answer(start(Constraint.json(), tokenizer), tokenizer, seed)
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "pattern", [r"[A-Z]{2}-\d{3}", r"(yes|no|I do not know)\.", r"x*", r"ä(ß|é){1,3}"]
)
def test_random_logits_under_a_pattern_match_it(tokenizer: Tokenizer, pattern: str) -> None:
    for seed in range(5):
        text = answer(start(Constraint.regex(pattern), tokenizer), tokenizer, seed)
        assert re.fullmatch(pattern, text), text


def test_end_is_allowed_exactly_where_the_answer_may_stop(tokenizer: Tokenizer) -> None:
    grammar = start(Constraint.regex("ab?c?"), tokenizer)
    eos = end_of(tokenizer)
    seen = [bool(grammar.allowed()[eos])]
    for letter in "abc":
        feed(grammar, tokenizer, letter)
        seen.append(bool(grammar.allowed()[eos]))
    assert seen == [False, True, True, True]
    assert grammar.allowed().nonzero().tolist() == [[eos]]
    assert grammar.finished
    grammar.accept(eos)
    with pytest.raises(ConstraintError, match=f"does not allow token {eos} here"):
        grammar.accept(eos)


def test_ending_early_finishes(tokenizer: Tokenizer) -> None:
    grammar = start(Constraint.regex("ab?"), tokenizer)
    feed(grammar, tokenizer, "a")
    assert not grammar.finished
    grammar.accept(end_of(tokenizer))
    assert grammar.finished


def test_impossible_tokens_are_refused_and_change_nothing(tokenizer: Tokenizer) -> None:
    grammar = start(Constraint.regex("ab"), tokenizer)
    z = tokenizer.token_id("z")
    assert z is not None
    for token in (z, end_of(tokenizer), 3, PADDED - 1, PADDED, -1):
        with pytest.raises(ConstraintError) as e:
            grammar.accept(token)
        assert str(e.value) == (
            f'the regular expression "ab" does not allow token {token} here: '
            "choose among those that allowed() names"
        )
    feed(grammar, tokenizer, "ab")
    assert grammar.finished


def test_blanks_between_json_tokens_are_bounded(tokenizer: Tokenizer) -> None:
    grammar = start(Constraint.json(), tokenizer)
    feed(grammar, tokenizer, '{\n  "a": 1,')
    feed(grammar, tokenizer, "\n" + " " * 32)
    assert not grammar.allowed()[tokenizer.hf.convert_tokens_to_ids("Ġ")]
    assert not grammar.allowed()[tokenizer.hf.convert_tokens_to_ids("Ċ")]


def test_two_grammars_are_independent_and_share_the_tokenizer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fresh, built = build(), []
    make = llguidance.hf.from_tokenizer

    def counted(*args: Any, **kwargs: Any) -> Any:
        built.append(args)
        return make(*args, **kwargs)

    monkeypatch.setattr(llguidance.hf, "from_tokenizer", counted)
    one, two = (start(Constraint.regex("ab"), fresh) for _ in range(2))
    feed(one, fresh, "ab")
    assert one.finished
    assert not two.finished
    assert len(built) == 1


def test_tokenizer_defaults_to_the_tokenizers(tokenizer: Tokenizer) -> None:
    grammar = constrain.compile_constraint(Constraint.regex("ab"), tokenizer)
    assert grammar.allowed().shape == (tokenizer.vocab_size,)


def test_half_characters_are_refused() -> None:
    with pytest.raises(ConstraintError) as e:
        Constraint.regex("a\ud800")
    assert str(e.value) == (
        "the regular expression has half a character, '\\ud800', at place 1: write whole characters"
    )
    with pytest.raises(ConstraintError, match="the JSON schema has half a character"):
        Constraint.json_schema({"const": "\udfff"})


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (
            Constraint.regex("a("),
            'the regular expression "a(" cannot be used: unclosed group; rewrite that part',
        ),
        (
            Constraint.regex("(?=a)b"),
            'the regular expression "(?=a)b" cannot be used: look-around, including look-ahead '
            "and look-behind, is not supported; rewrite that part",
        ),
        (
            Constraint.regex(r"[^\x00-\x{10FFFF}]"),
            r'the regular expression "[^\x00-\x{10FFFF}]" cannot be used: no text matches it; '
            "rewrite that part",
        ),
        (
            Constraint.json_schema({"type": "nope"}),
            'the JSON schema {"type": "nope"} cannot be used: Invalid type: nope; '
            "rewrite that part",
        ),
        (
            Constraint.json_schema({"not": {}}),
            'the JSON schema {"not": {}} cannot be used: Unimplemented keys: ["not"]; '
            "rewrite that part",
        ),
    ],
)
def test_refusals_name_the_reason(
    tokenizer: Tokenizer, constraint: Constraint, message: str
) -> None:
    with pytest.raises(ConstraintError) as e:
        start(constraint, tokenizer)
    assert str(e.value) == message


def test_a_tokenizer_without_an_end_is_refused(tokenizer: Tokenizer) -> None:
    endless = SimpleNamespace(hf=tokenizer.hf, eos_id=None, vocab_size=tokenizer.vocab_size)
    with pytest.raises(ConstraintError) as e:
        constrain.compile_constraint(Constraint.json(), endless)
    assert str(e.value) == (
        "the tokenizer names no end token (eos), so a constrained answer could not end: "
        "add eos_token to its tokenizer_config.json"
    )


def test_the_deepest_schema_compiles(tokenizer: Tokenizer) -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(constrain.MAX_SCHEMA_DEPTH - 2):
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
    depth = constrain.MAX_SCHEMA_DEPTH - 2
    grammar = start(Constraint.json_schema(schema), tokenizer)
    feed(grammar, tokenizer, "[" * depth + "7" + "]" * depth)
    assert grammar.finished


def test_sizes_and_forms_are_checked_at_once() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    cases: list[tuple[Any, str]] = [
        ("{", 'the JSON schema "{" is not JSON: Expecting property name'),
        ("[1]", "the JSON schema is [1]: it must be a JSON object"),
        ({"enum": [object]}, 'the JSON schema {"enum": ["<class \'object\'>"]} is not JSON: '),
        ({"const": "x" * 70_000}, "the JSON schema has 70013 bytes: use one of at most 65536"),
        (deep, "the JSON schema is nested too deeply: use at most 64 levels"),
        ('{"items":' * 7000, "the JSON schema is nested too deeply: use at most 64 levels"),
    ]
    for schema, message in cases:
        with pytest.raises(ConstraintError) as e:
            Constraint.json_schema(schema)
        assert str(e.value).startswith(message)
    with pytest.raises(ConstraintError) as e:
        Constraint.regex("a" * 4097)
    assert str(e.value) == ("the regular expression has 4097 characters: use one of at most 4096")


def test_response_formats() -> None:
    read = from_response_format
    assert read(None) is None
    assert read({"type": "text"}) is None
    assert read({"type": "json_object"}) == Constraint.json()
    named = {"name": "person", "strict": True, "schema": SCHEMA}
    assert read({"type": "json_schema", "json_schema": named}) == Constraint.json_schema(SCHEMA)
    assert read({"type": "regex", "pattern": "a+"}) == Constraint.regex("a+")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"type": "xml"},
            'response_format.type is "xml": use text, json_object, json_schema or regex',
        ),
        ({}, "response_format.type is null: use text, json_object, json_schema or regex"),
        (
            {"type": "json_schema", "json_schema": {"name": "x"}},
            'response_format.json_schema is {"name": "x"}: '
            "it must be an object with the schema under schema",
        ),
        ({"type": "regex"}, "response_format.pattern is null: it must be a string"),
    ],
)
def test_bad_response_formats(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ConstraintError) as e:
        from_response_format(value)
    assert str(e.value) == message
