"""Tiny tokenizers and chat templates in the manner of LFM2, built in memory for tests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from lfm2_mm.tokenizer import Tokenizer

SPECIALS = (
    "<|pad|>",
    "<|startoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|tool_call_start|>",
    "<|tool_call_end|>",
    "<|image_start|>",
    "<image>",
    "<|image_end|>",
    "<|img_row_1_col_1|>",
    "<|img_thumbnail|>",
)
PLAIN_ADDED = ("<think>", "</think>")  # added tokens that are not marked special

CORPUS = (
    "the quick brown fox jumps over the lazy dog and the cat sat on the mat",
    "what colour is the circle? how many stars are there in the picture?",
    "größe naïve 你好 世界 🙂🙃 import def return image start end tool",
)

# Lists as content, tools with a date, thinking stripped from past turns, calls in Pythonic form.
LFM25_TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(system="", last=-1) -%}
{%- macro said(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for item in content -%}
{%- if item.type == "image" -%}{{ "<image>" }}{%- elif item.type == "text" -%}{{ item.text }}
{%- else -%}{{ item | tojson }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0].role == "system" -%}
{%- set ns.system = said(messages[0].content) -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- if tools -%}
{%- set ns.system = ns.system + ("\\n\\n" if ns.system else "") + "Today's date: "
    + strftime_now("%Y-%m-%d") + "\\n\\nList of tools: " + (tools | tojson) -%}
{%- endif -%}
{%- if ns.system -%}{{ "<|im_start|>system\\n" + ns.system + "<|im_end|>\\n" }}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == "assistant" -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{{- "<|im_start|>" + message.role + "\\n" -}}
{%- if message.role == "assistant" -%}
{%- generation -%}
{%- set content = said(message.content) -%}
{%- if "</think>" in content and loop.index0 != ns.last -%}
{%- set content = content.split("</think>")[-1] | trim -%}
{%- endif -%}
{{- content -}}
{%- if message.tool_calls -%}
{{- "<|tool_call_start|>[" -}}
{%- for call in message.tool_calls -%}
{{- call.function.name + "(" -}}
{%- for name, value in call.function.arguments.items() -%}
{{- name + "=" + (value | tojson) + ("" if loop.last else ", ") -}}
{%- endfor -%}
{{- ")" + ("" if loop.last else ", ") -}}
{%- endfor -%}
{{- "]<|tool_call_end|>" -}}
{%- endif -%}
{{- "<|im_end|>\\n" -}}
{%- endgeneration -%}
{%- else -%}
{{- said(message.content) + "<|im_end|>\\n" -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
{%- if thinking is defined and thinking -%}{{- "<think>" -}}{%- endif -%}
"""

# Strings as content only.
LFM2_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- "<|im_start|>" + message["role"] + "\\n" + message["content"] + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""


@cache
def _backend() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        show_progress=False,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken(text, normalized=False) for text in PLAIN_ADDED])
    return backend


def tiny_hf(template: str | None = LFM25_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with LFM2's ChatML specials."""
    hf = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Backend.from_str(_backend().to_str()),
        bos_token="<|startoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
    )
    hf.chat_template = template
    return hf


def tiny_tokenizer(
    template: str | None = LFM25_TEMPLATE, *, control: Sequence[str] = ()
) -> Tokenizer:
    """`tiny_hf` behind our own face."""
    return Tokenizer(tiny_hf(template), control=control)


def save_tiny_tokenizer(folder: Path, template: str | None = LFM25_TEMPLATE) -> None:
    """Write the files that a checkpoint folder holds."""
    tiny_hf(template).save_pretrained(str(folder))


def sentencepiece_backend() -> Backend:
    """Leading spaces as `▁` and bytes as `<0x..>`: the other way of decoding."""
    words = ["▁", "▁the", "▁cat", "s", "a", "t", "é", "▁你", "好", "."]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {word: 256 + i for i, word in enumerate(words)} | {"<unk>": 256 + len(words)}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens(["<s>"])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend
