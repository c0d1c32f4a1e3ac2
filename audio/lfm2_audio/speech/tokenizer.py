"""Builds the tokenizer of nano-audio: byte-level BPE, and the chat template of the text models.

Special tokens stand at the ids they have in the released LFM2-Audio, because the official code
knows them by number. It needs `tokenizers` when it builds, nothing before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from lfm2_audio.speech.sentences import lexicon, sentence

__all__ = ["CHAT_TEMPLATE", "MAX_LENGTH", "SPECIAL_TOKENS", "VOCABULARY", "tokenizer_files"]

VOCABULARY = 1536
"""Tokens in all, special ones included."""
MAX_LENGTH = 4096
"""Positions the model is made for."""

_NAMED = {
    0: "<|pad|>",
    1: "<|startoftext|>",
    2: "<|endoftext|>",
    3: "<|fim_pre|>",
    4: "<|fim_mid|>",
    5: "<|fim_suf|>",
    6: "<|im_start|>",
    7: "<|im_end|>",
    8: "<|tool_list_start|>",
    9: "<|tool_list_end|>",
    10: "<|tool_call_start|>",
    11: "<|tool_call_end|>",
    12: "<|tool_response_start|>",
    13: "<|tool_response_end|>",
    128: "<|audio_start|>",
    129: "<|text_start|>",
    130: "<|text_end|>",
    131: "<|mixed_start|>",
    132: "<|mixed_end|>",
}

SPECIAL_TOKENS = tuple(_NAMED.get(i, f"<|reserved_{i}|>") for i in range(max(_NAMED) + 1))
"""The first ids, in order."""

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- "<|im_start|>" + message["role"] + "\\n" -}}
    {%- if message["content"] is string -%}
        {{- message["content"] -}}
    {%- else -%}
        {%- for part in message["content"] -%}
            {%- if part["type"] == "text" -%}
                {{- part["text"] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""
"""`bos`, then each turn between `<|im_start|>` and `<|im_end|>`; sound has no place in the text."""

_SENTENCES = 4000
_CONTROL = (
    "Perform ASR.",
    "Perform TTS. Use the US male voice.",
    "Perform TTS. Use the US female voice.",
    "Perform TTS. Use the UK male voice.",
    "Perform TTS. Use the UK female voice.",
    "Respond with interleaved text and audio.",
)
_ANSWERS = (
    "it is spelled a b c d e f g h i j k l m n o p q r s t u v w x y z",
    "the answer is minus one hundred and twenty eins zwei drei vier fünf sechs sieben acht neun "
    "zehn elf zwölf zwanzig un deux trois quatre cinq sept huit neuf dix onze douze vingt uno dos "
    "tres cuatro cinco seis siete ocho nueve diez once doce veinte santiago yes no sorry i do not "
    "know that hello good thank you",
)


def tokenizer_files() -> dict[str, str]:
    """Names and contents of the tokenizer's files; the same bytes each time.

    Every word of the lexicon is one token behind a space.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    bos = SPECIAL_TOKENS[1]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, 1)],
    )
    missing = VOCABULARY - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([f"<|unused_{i}|>" for i in range(missing)])
    named = {"bos_token": bos, "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    config = {
        **named,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        "special_tokens_map.json": json.dumps(named, indent=2) + "\n",
        "chat_template.jinja": CHAT_TEMPLATE,
    }


def _corpus() -> Iterator[str]:
    """What is said to the model and what it answers; then each word at both places."""
    for index in range(_SENTENCES):
        yield sentence(0, index)[0]
    for _ in range(60):  # often enough that words become one token before rare pairs do
        yield from _CONTROL
        yield from _ANSWERS
        yield "".join(f" {word}" for word in lexicon())
        yield from lexicon()
        yield "system\nuser\nassistant\n"
