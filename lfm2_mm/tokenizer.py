"""The checkpoint's tokenizer behind a small face: text to ids, ids to text, special strings.

Reads `tokenizer.json` from a local folder and never imports a class that the checkpoint names. This
module deliberately knows nothing of chat templates beyond handing one out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm2_mm.errors import CheckpointError
from lfm2_mm.toolcalls import CALL_END, CALL_START, THINK_END, THINK_START

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Tokenizer"]

OUTPUT_MARKERS = frozenset({THINK_START, THINK_END, CALL_START, CALL_END})


class Tokenizer:
    """A fast tokenizer of `transformers`, seen through what prompts and streams need.

    Attributes:
        hf: The object of `transformers`, for libraries that want it.
        added_strings: The text of every added token, special or not.
        special_strings: Text that must never come from a user: the added tokens marked special,
            and the control strings the caller named.
        bos_id: The id of the begin token, or None.
        eos_id: The id of the end token, or None.
        pad_id: The id of the padding token, or None.
        vocab_size: Number of ids, added tokens included (a model may have more rows than that).
        chat_template: The checkpoint's Jinja template; several named ones as a mapping; or None.
    """

    def __init__(self, hf: PreTrainedTokenizerFast, *, control: Iterable[str] = ()) -> None:
        self.hf = hf
        added = hf.added_tokens_decoder.values()
        self.added_strings = frozenset(token.content for token in added)
        self.special_strings = frozenset(
            {token.content for token in added if token.special}
            | set(hf.all_special_tokens)
            | {string for string in control if string}
        )
        self.bos_id: int | None = hf.bos_token_id
        self.eos_id: int | None = hf.eos_token_id
        self.pad_id: int | None = hf.pad_token_id
        self.vocab_size = len(hf)
        self._hidden = frozenset(
            i
            for i, token in hf.added_tokens_decoder.items()
            if token.special and token.content not in OUTPUT_MARKERS
        )
        self.chat_template: str | dict[str, str] | None = hf.chat_template

    @classmethod
    def load(cls, folder: str | Path, *, control: Iterable[str] = ()) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder, without network and without remote code.

        Args:
            folder: A folder with `tokenizer.json` (and usually `tokenizer_config.json`).
            control: Strings that count as special beside the tokens marked so.

        Raises:
            CheckpointError: if the folder holds no tokenizer, or one that cannot be read.
        """
        from transformers import PreTrainedTokenizerFast

        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(
                f"the folder {str(folder)!r} holds no tokenizer.json, so its text cannot be "
                "tokenized; copy the checkpoint's tokenizer files into it"
            )
        try:
            hf = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
            if hf.chat_template is None:
                hf.chat_template = _legacy_template(folder)
        except Exception as error:  # the tokenizers library raises bare Exception on damaged files
            raise CheckpointError(
                f"the tokenizer in {str(folder)!r} cannot be read "
                f"({' '.join(str(error).split())[:200]}); fetch the checkpoint's tokenizer files "
                "again"
            ) from error
        return cls(hf, control=control)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special strings in it become their tokens, none is added around it."""
        ids: list[int] = self.hf(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of somebody's text: special strings in it are ordinary text.

        Each is cut behind its first character, as in chat prompts; all else is as in `encode`.
        """
        cuts = [0]
        strings = [string for string in self.special_strings if len(string) > 1]
        found = {m.start() + 1 for s in strings for m in re.finditer(f"(?={re.escape(s)})", text)}
        cuts += sorted(found) + [len(text)]
        pieces = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        return [i for piece in pieces for i in self.encode(piece)]

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Like `encode`, with the index of the first character of `text` behind each id."""
        encoded = self.hf(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`, spaces untouched; incomplete characters come out as U+FFFD.

        Args:
            ids: Token ids.
            skip_special: Leave out tokens marked special. Tool-call markers are such tokens in
                some checkpoints: decode with False what `lfm2_mm.toolcalls` shall parse.
        """
        return str(
            self.hf.decode(
                list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
            )
        )

    def decode_output(self, ids: Sequence[int]) -> str:
        """Text of a model's own output: special tokens left out, but not think and call markers."""
        kept = [i for i in ids if i not in self._hidden]
        return self.decode(kept, skip_special=False)

    def token_id(self, string: str) -> int | None:
        """The id whose token is exactly `string`, or None."""
        found: int | None = self.hf.backend_tokenizer.token_to_id(string)
        return found


def _legacy_template(folder: Path) -> str | None:
    """The template of older processors, which kept it in a JSON file of its own."""
    path = folder / "chat_template.json"
    if not path.is_file():
        return None
    data: Any = json.loads(path.read_text(encoding="utf-8"))
    template = data.get("chat_template") if isinstance(data, dict) else None
    return template if isinstance(template, str) else None
