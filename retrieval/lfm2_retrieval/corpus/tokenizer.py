"""nano-colbert's tokenizer: byte-level BPE over the training texts, without case.

Byte-level, so that any text can be written in it; the special ids are those of LFM2. Knows no
model and no file of the corpus.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

__all__ = ["DOCUMENT_PREFIX", "QUERY_PREFIX", "SPECIAL", "tokenizer_files", "train_tokenizer"]

SPECIAL = (
    "<|pad|>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|fim_pre|>",
    "<|fim_mid|>",
    "<|fim_suf|>",
    "<|im_start|>",
    "<|im_end|>",
)
"""The first ids, as in LFM2: 0 pads, 1 begins, 7 ends."""
QUERY_PREFIX, DOCUMENT_PREFIX = "[Q] ", "[D] "


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A tokenizer with so many ids, the two prefixes included.

    The outcome depends on the texts and their order only.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size - 2,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # bare punctuation must be there, for the skip list of documents
    tokenizer.train_from_iterator([*texts, *string.punctuation], trainer)
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False) for text in (QUERY_PREFIX, DOCUMENT_PREFIX)]
    )
    begin = SPECIAL[1]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, 1)]
    )
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Names and contents of the tokenizer's files in a checkpoint."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[7],
        "pad_token": SPECIAL[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 511,
    }
    compact = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    return {
        "tokenizer.json": compact,
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
