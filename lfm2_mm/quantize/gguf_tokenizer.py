"""The tokenizer that a GGUF file's metadata describe: byte-level BPE with LFM2's way of cutting.

Source: the keys `tokenizer.ggml.*` of the GGUF specification, and the regular expression that
LFM2's own `tokenizer.json` shares with Llama 3. Knows metadata; no tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lfm2_mm.errors import CheckpointError
from lfm2_mm.tokenizer import Tokenizer

__all__ = ["tokenizer_of"]

_CUTS = ("lfm2", "llama3", "llama-bpe", "llama-v3")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5


def tokenizer_of(read: Callable[[str], Any], where: str) -> Tokenizer:
    """Build the tokenizer.

    Args:
        read: Gives the value of a metadata key, or None.
        where: What the user calls the file.

    Raises:
        CheckpointError: if the metadata describe none, or one of another kind.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = read("tokenizer.ggml.tokens"), read("tokenizer.ggml.token_type")
    merges = read("tokenizer.ggml.merges") or []
    model, cut = read("tokenizer.ggml.model"), read("tokenizer.ggml.pre")
    if not tokens or model != "gpt2" or cut not in _CUTS:
        raise CheckpointError(
            f"the tokenizer in {where} is of the kind {model!r}, {cut!r}, which cannot be built "
            "from a GGUF file; put the tokenizer.json of the original checkpoint beside it"
        )
    kinds = kinds or [1] * len(tokens)
    vocab = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind != _UNUSED
    }
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        backend = Backend(models.BPE(vocab, pairs, ignore_merges=True))
    except Exception as error:  # the tokenizers library raises bare Exception
        why = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the tokenizer in {where} cannot be built ({why}); put the tokenizer.json of the "
            "original checkpoint beside it"
        ) from None
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, one in zip(tokens, kinds, strict=True)
            if one == kind
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    named = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        token = read(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token, int) and 0 <= token < len(tokens):
            named[f"{name}_token"] = tokens[token]
    hf = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, **named
    )
    hf.chat_template = read("tokenizer.chat_template")
    return Tokenizer(hf)
