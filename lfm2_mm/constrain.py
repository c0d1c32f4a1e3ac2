"""A JSON schema or a regular expression becomes, token by token, the mask of what may come next.

The grammars are llguidance's. This module knows nothing of logits or of how a token is chosen.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import llguidance
import llguidance.hf
import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from lfm2_mm.errors import ConstraintError

__all__ = [
    "MAX_REGEX_CHARS",
    "MAX_SCHEMA_BYTES",
    "MAX_SCHEMA_DEPTH",
    "Constraint",
    "Grammar",
    "compile_constraint",
    "from_response_format",
]

MAX_SCHEMA_BYTES = 65_536
MAX_SCHEMA_DEPTH = 64
MAX_REGEX_CHARS = 4096

# Between JSON tokens: enough for an indented answer, too little to go on with blanks for ever.
_JSON_BLANKS = r"(\x20{1,2}|\x0D?\x0A[\x20\x09]{0,32})"

_FORMATS = "text, json_object, json_schema or regex"


@runtime_checkable
class _Vocabulary(Protocol):
    """What is used of `lfm2_mm.tokenizer.Tokenizer`."""

    @property
    def hf(self) -> Any: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def vocab_size(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must match; made by `json_schema`, `regex` or `json`.

    Attributes:
        kind: The language of `source`.
        source: The schema as JSON text, or the pattern.
    """

    kind: Literal["json_schema", "regex"]
    source: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Constraint:
        """Answers that are JSON and match a schema, given as a mapping or as JSON text.

        Raises:
            ConstraintError: The schema is not JSON, too large or too deeply nested.
        """
        try:
            parsed = json.loads(schema) if isinstance(schema, str) else schema
            if not isinstance(parsed, Mapping):
                raise ConstraintError(
                    f"the JSON schema is {_short(parsed)}: it must be a JSON object"
                )
            _check_depth(parsed)
            text = json.dumps(parsed, ensure_ascii=False)
        except RecursionError:
            raise _too_deep() from None
        except (ValueError, TypeError) as error:
            raise ConstraintError(
                f"the JSON schema {_short(schema)} is not JSON: {error}; correct it there"
            ) from None
        _check_text(text, "JSON schema")
        size = len(text.encode())
        if size > MAX_SCHEMA_BYTES:
            raise ConstraintError(
                f"the JSON schema has {size} bytes: use one of at most {MAX_SCHEMA_BYTES}"
            )
        return cls("json_schema", text)

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Answers that a regular expression matches from end to end.

        Raises:
            ConstraintError: The pattern is too long.
        """
        _check_text(pattern, "regular expression")
        if len(pattern) > MAX_REGEX_CHARS:
            raise ConstraintError(
                f"the regular expression has {len(pattern)} characters: "
                f"use one of at most {MAX_REGEX_CHARS}"
            )
        return cls("regex", pattern)

    @classmethod
    def json(cls) -> Constraint:
        """Answers that are some JSON object."""
        return cls("json_schema", '{"type": "object"}')


def from_response_format(response_format: Mapping[str, Any] | None) -> Constraint | None:
    """Read the `response_format` of an OpenAI request; None where anything may be answered.

    Known types are `text`, `json_object`, `json_schema` (with `json_schema.schema`) and, as an
    extension, `regex` (with `pattern`).

    Raises:
        ConstraintError: The type is unknown, a part is missing, or the schema cannot be used.
    """
    if response_format is None:
        return None
    match response_format.get("type"):
        case "text":
            return None
        case "json_object":
            return Constraint.json()
        case "json_schema":
            inner = response_format.get("json_schema")
            schema = inner.get("schema") if isinstance(inner, Mapping) else None
            if not isinstance(schema, Mapping):
                raise ConstraintError(
                    f"response_format.json_schema is {_short(inner)}: "
                    "it must be an object with the schema under schema"
                )
            return Constraint.json_schema(schema)
        case "regex":
            pattern = response_format.get("pattern")
            if not isinstance(pattern, str):
                raise ConstraintError(
                    f"response_format.pattern is {_short(pattern)}: it must be a string"
                )
            return Constraint.regex(pattern)
        case other:
            raise ConstraintError(f"response_format.type is {_short(other)}: use {_FORMATS}")


class Grammar:
    """The state of one constrained answer: what may come next, given the tokens so far."""

    def __init__(
        self, matcher: llguidance.LLMatcher, eos_id: int, vocab_size: int, name: str
    ) -> None:
        """Made by `compile_constraint`; `name` is what errors call the constraint."""
        self._matcher = matcher
        self._eos_id = eos_id
        self._vocab_size = vocab_size
        self._name = name
        self._allowed: Tensor | None = None
        self._ended = False

    @property
    def finished(self) -> bool:
        """Whether the answer is complete: it was ended, or no text can follow it."""
        return self._ended or self._matcher.is_stopped()

    def allowed(self) -> Bool[Tensor, " v"]:
        """Tokens that may come next, on the CPU; False for ids that have no token.

        The end token is True exactly where the answer so far is complete, and the only True one
        where nothing else can follow. The tensor belongs to the grammar: do not write into it.

        Raises:
            ConstraintError: llguidance gave up, as on a pattern that grows too complex.
        """
        if self._allowed is None:
            packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            if self._matcher.is_error():
                raise _unusable(self._name, self._matcher)
            bits = np.unpackbits(packed, bitorder="little")[: self._vocab_size]
            self._allowed = torch.from_numpy(bits.view(np.bool_))
        return self._allowed

    def accept(self, token_id: int) -> None:
        """Move on by the token that was chosen.

        Raises:
            ConstraintError: The token was not allowed here.
        """
        inside = 0 <= token_id < self._vocab_size
        if self._ended or not inside or not bool(self.allowed()[token_id]):
            raise ConstraintError(
                f"{self._name} does not allow token {token_id} here: "
                "choose among those that allowed() names"
            )
        self._allowed = None
        self._ended = token_id == self._eos_id
        if not self._matcher.consume_token(token_id):
            raise _unusable(self._name, self._matcher)


def compile_constraint(
    constraint: Constraint, tokenizer: _Vocabulary, *, vocab_size: int | None = None
) -> Grammar:
    """Start a constrained answer: one grammar per request.

    The first call for a tokenizer reads its whole vocabulary (about a second for 65,536 tokens);
    the result is kept as long as the tokenizer lives.

    Args:
        constraint: What the answer must match.
        tokenizer: The model's tokenizer.
        vocab_size: Number of the model's logits, where it is not the tokenizer's `vocab_size`.

    Raises:
        ConstraintError: The schema or pattern is invalid, matches nothing or uses something that
            llguidance lacks (the text names its reason); or the tokenizer has no end token.
    """
    eos_id = tokenizer.eos_id
    if eos_id is None:
        raise ConstraintError(
            "the tokenizer names no end token (eos), so a constrained answer could not end: "
            "add eos_token to its tokenizer_config.json"
        )
    size = tokenizer.vocab_size if vocab_size is None else vocab_size
    name = _name(constraint)
    if constraint.kind == "regex":
        grammar = llguidance.LLMatcher.grammar_from_regex(constraint.source)
    else:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(
            constraint.source, defaults={"whitespace_pattern": _JSON_BLANKS}
        )
    matcher = llguidance.LLMatcher(
        _vocabulary(tokenizer, eos_id, size),
        grammar,
        log_level=0,
        limits=llguidance.LLParserLimits(verbose_errors=False),
    )
    if matcher.is_error():
        raise _unusable(name, matcher)
    started = Grammar(matcher, eos_id, size, name)
    started.allowed()  # an expression that matches no text shows only here
    return started


_vocabularies: WeakKeyDictionary[Any, dict[tuple[int, int], llguidance.LLTokenizer]] = (
    WeakKeyDictionary()
)
_building = threading.Lock()


def _vocabulary(tokenizer: _Vocabulary, eos_id: int, size: int) -> llguidance.LLTokenizer:
    """The form llguidance reads a tokenizer in, with at least `size` ids; built only once."""
    key = (eos_id, max(size, len(tokenizer.hf)))
    with _building:
        known = _vocabularies.setdefault(tokenizer.hf, {})
        if key not in known:
            known[key] = llguidance.hf.from_tokenizer(
                tokenizer.hf, n_vocab=key[1], eos_token=key[0]
            )
        return known[key]


def _name(constraint: Constraint) -> str:
    """What errors call a constraint."""
    if constraint.kind == "regex":
        return f"the regular expression {_short(constraint.source)}"
    return f"the JSON schema {_short(json.loads(constraint.source))}"


def _unusable(name: str, matcher: llguidance.LLMatcher) -> ConstraintError:
    """The error for a constraint that llguidance refuses, with its reason in one line."""
    lines = [line.strip() for line in matcher.get_error().splitlines() if line.strip()]
    stated = [line for line in lines if line.startswith("error:")]
    reason = (stated or lines or ["no text matches it"])[0].removeprefix("error:").strip()
    reason = re.sub(r"^at \d+\(\d+\): ", "", reason)
    reason = re.sub(r'^invalid regex ".*" \(in regex\): ', "", reason)
    if reason.startswith("NoExtension"):
        reason = "no text matches it"
    return ConstraintError(f"{name} cannot be used: {reason}; rewrite that part")


def _short(value: object) -> str:
    """A value as it is shown in an error: at most 60 characters."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    text = " ".join(text.split())
    text = f"{text[:57]}..." if len(text) > 60 else text
    return f'"{text}"' if isinstance(value, str) else text


def _too_deep() -> ConstraintError:
    return ConstraintError(
        f"the JSON schema is nested too deeply: use at most {MAX_SCHEMA_DEPTH} levels"
    )


def _check_depth(schema: object) -> None:
    """Refuse deep nesting before it can exhaust the stack of a recursive reader."""
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        inner: list[object] = []
        for node in level:
            if isinstance(node, Mapping):
                inner += node.values()
            elif isinstance(node, list | tuple):
                inner += node
        if not inner:
            return
        level = inner
    raise _too_deep()


def _check_text(text: str, what: str) -> None:
    """Refuse a lone surrogate, which is half a character and cannot be written."""
    bad = next((i for i, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
    if bad is not None:
        raise ConstraintError(
            f"the {what} has half a character, {ascii(text[bad])}, at place {bad}: "
            "write whole characters"
        )
