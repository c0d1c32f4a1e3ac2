"""Texts become the token ids a retriever reads, with the rows that are kept and where they stand.

The rules are PyLate's: the prefix is one token behind the begin token, queries are filled up with
the mask (else end) token, tokens of the skiplist are dropped from documents. Knows the tokenizer
and the spec; deliberately nothing of tensors or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lfm2_mm.errors import CheckpointError
from lfm2_mm.tokenizer import Tokenizer
from lfm2_retrieval.layout import RetrieverSpec

__all__ = ["Inputs", "Sequences", "TokenSpan"]

TokenSpan = tuple[str, int, int]
"""Text of a token and its first and last + 1 character; -1, -1 where it is none of the text."""

_AT_ONCE = 1024  # texts tokenized in one call; bounds the memory of their encodings


@dataclass(frozen=True)
class Sequences:
    """Token ids of some texts.

    Attributes:
        ids: Per text.
        fill: Per text, how many ids at the end are filling that other positions do not attend to.
    """

    ids: list[list[int]]
    fill: list[int]


class Inputs:
    """Turns texts into `Sequences` by a retriever's spec.

    Whitespace around a text is dropped, as PyLate does (sentence-transformers 6 keeps it). Text
    that spells an added token becomes that token, as in both.

    Args:
        tokenizer: The checkpoint's; its truncation and padding are switched off for good.
        spec: The rules.
        max_positions: The longest sequence where the spec sets no limit.
        where: What the user calls the checkpoint; used in messages.

    Raises:
        CheckpointError: if the tokenizer lacks a prefix or has nothing to fill queries with.
    """

    def __init__(
        self, tokenizer: Tokenizer, spec: RetrieverSpec, *, max_positions: int, where: str
    ) -> None:
        self.tokenizer, self.spec = tokenizer, spec
        self._backend: Any = tokenizer.hf.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._before, self._after = self._template()
        self._prefixes = {
            "query": self._token(spec.query_prefix, "query prefix", where),
            "document": self._token(spec.document_prefix, "document prefix", where),
        }
        self._fill = self._filling(where) if spec.expansion else None
        self._limits = {
            "query": self._query_limit(max_positions),
            "document": min(spec.document_length or max_positions, max_positions),
        }
        self._prompts = {"query": spec.query_prompt, "document": spec.document_prompt}
        self.skipped = frozenset(
            found
            for word in spec.skiplist
            if (found := tokenizer.token_id(word)) is not None and not self._is_unknown(found, word)
        )

    def queries(self, texts: Sequence[str]) -> Sequences:
        """Ids of queries, filled up where the spec says so."""
        ids = [self._wrap(content, "query") for content in self._contents(texts, "query")]
        expansion = self.spec.expansion
        if expansion is None or self._fill is None:
            return Sequences(ids, [0] * len(ids))
        missing = [max(0, expansion.length - len(row)) for row in ids]
        for row, n in zip(ids, missing, strict=True):
            row += [self._fill] * n
        return Sequences(ids, [0] * len(ids) if expansion.attend else missing)

    def documents(self, texts: Sequence[str]) -> Sequences:
        """Ids of documents."""
        ids = [self._wrap(content, "document") for content in self._contents(texts, "document")]
        return Sequences(ids, [0] * len(ids))

    def query_spans(self, text: str) -> list[TokenSpan]:
        """One entry per id of `queries([text])`."""
        spans = self._spans(text, "query")
        filled = len(self.queries([text]).ids[0]) - len(spans)
        return spans + [(self._string(self._fill), -1, -1)] * filled

    def document_spans(self, text: str) -> list[TokenSpan]:
        """One entry per id of `documents([text])` that is not skipped."""
        ids = self.documents([text]).ids[0]
        spans = self._spans(text, "document")
        return [span for i, span in zip(ids, spans, strict=True) if i not in self.skipped]

    def count(self, text: str) -> int:
        """Number of tokens of the bare text."""
        return len(self._backend.encode_batch_fast([_valid(text)], add_special_tokens=False)[0])

    def _contents(self, texts: Sequence[str], side: str) -> list[list[int]]:
        found: list[list[int]] = []
        whole = [self._text(text, side) for text in texts]
        for start in range(0, len(whole), _AT_ONCE):
            some = whole[start : start + _AT_ONCE]
            encoded = self._backend.encode_batch_fast(some, add_special_tokens=False)
            found += [encoding.ids[: self._room(side)] for encoding in encoded]
        return found

    def _text(self, text: str, side: str) -> str:
        text = _valid(text).strip()
        return self._prompts[side] + (text.lower() if self.spec.lower_case else text)

    def _room(self, side: str) -> int:
        """Tokens left for the text beside special tokens and prefix."""
        taken = len(self._before) + len(self._after) + (self._prefixes[side] is not None)
        return max(0, self._limits[side] - taken)

    def _wrap(self, content: list[int], side: str) -> list[int]:
        ids = [*self._before, *content, *self._after]
        prefix = self._prefixes[side]
        if prefix is not None:
            ids.insert(1, prefix)
        return ids

    def _spans(self, text: str, side: str) -> list[TokenSpan]:
        text = _valid(text)
        whole = self._text(text, side)
        shift = len(text) - len(text.lstrip()) - len(self._prompts[side])
        encoded = self._backend.encode_batch([whole], add_special_tokens=False)[0]
        content = [
            self._span(text, i, start + shift, end + shift)
            for i, (start, end) in zip(encoded.ids, encoded.offsets, strict=True)
        ][: self._room(side)]
        spans = [
            *((self._string(i), -1, -1) for i in self._before),
            *content,
            *((self._string(i), -1, -1) for i in self._after),
        ]
        prefix = self._prefixes[side]
        if prefix is not None:
            spans.insert(1, (self._string(prefix), -1, -1))
        return spans

    def _span(self, text: str, token: int, start: int, end: int) -> TokenSpan:
        """A span without the whitespace at its ends; a token of white space alone keeps it."""
        if end <= 0:
            return self._string(token), -1, -1
        start = max(0, start)
        piece = text[start:end]
        bare = piece.strip()
        if bare:
            start += len(piece) - len(piece.lstrip())
            piece = bare
        return piece, start, start + len(piece)

    def _template(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and behind a text."""
        encoded = self._backend.encode_batch(["a"], add_special_tokens=True)[0]
        real = [i for i, special in enumerate(encoded.special_tokens_mask) if not special]
        if not real:
            return list(encoded.ids), []
        return encoded.ids[: real[0]], encoded.ids[real[-1] + 1 :]

    def _query_limit(self, max_positions: int) -> int:
        expansion = self.spec.expansion
        limit = min(self.spec.query_length or max_positions, max_positions)
        if expansion is None:
            return limit
        return expansion.length if expansion.cut else max(limit, expansion.length)

    def _token(self, string: str, what: str, where: str) -> int | None:
        if not string:
            return None
        if (found := self.tokenizer.token_id(string)) is None:
            raise CheckpointError(
                f"the {what} {string!r} of {where} is no token of its tokenizer; "
                "the files belong to different checkpoints"
            )
        return found

    def _filling(self, where: str) -> int:
        """PyLate's order: the mask token, else the end token, else the padding token."""
        named = self.spec.expansion.token if self.spec.expansion else None
        if named is not None:
            found = self.tokenizer.token_id(named)
        else:
            hf = self.tokenizer.hf
            order = (hf.mask_token_id, self.tokenizer.eos_id, self.tokenizer.pad_id)
            found = next((i for i in order if i is not None), None)
        if found is None:
            raise CheckpointError(
                f"{where} fills up its queries, but its tokenizer has no mask, end or padding "
                "token; use the tokenizer files of the checkpoint"
            )
        return found

    def _is_unknown(self, token: int, word: str) -> bool:
        hf = self.tokenizer.hf
        return bool(token == hf.unk_token_id and word != hf.unk_token)

    def _string(self, token: int | None) -> str:
        return "" if token is None else self.tokenizer.decode([token], skip_special=False)


def _valid(text: str) -> str:
    """The text with lone surrogates, which no tokenizer takes, as question marks."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text
