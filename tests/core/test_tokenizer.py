from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lfm2_mm.errors import CheckpointError
from lfm2_mm.tokenizer import Tokenizer
from tests.core.tiny_tokenizer import (
    CORPUS,
    LFM25_TEMPLATE,
    SPECIALS,
    save_tiny_tokenizer,
    tiny_tokenizer,
)


def test_a_folder_is_read(tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.special_strings == frozenset(SPECIALS)
    assert tokenizer.added_strings == {*SPECIALS, "<think>", "</think>"}
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 3)
    assert tokenizer.vocab_size == 1 + max(tokenizer.hf.get_vocab().values())
    assert tokenizer.chat_template == LFM25_TEMPLATE
    assert tokenizer.token_id("<image>") == SPECIALS.index("<image>")
    assert tokenizer.token_id("no such token") is None


@pytest.mark.parametrize("text", [*CORPUS, "", " a  b ", "\n\t", "<|im_end|>x"])
def test_text_survives(text: str) -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_special_strings_are_parsed_and_skipped() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("a<image>b")
    assert ids.count(SPECIALS.index("<image>")) == 1
    assert ids[0] != tokenizer.bos_id
    assert tokenizer.decode(ids) == "ab"


def test_starts_are_characters() -> None:
    tokenizer = tiny_tokenizer()
    text = "🙂<image>é<|im_end|>"
    ids, starts = tokenizer.encode_with_starts(text)
    assert ids == tokenizer.encode(text)
    assert starts[ids.index(SPECIALS.index("<image>"))] == 1
    assert starts[ids.index(SPECIALS.index("<|im_end|>"))] == text.index("<|im_end|>")


def test_control_strings_join_the_special_ones() -> None:
    assert "<box>" in tiny_tokenizer(control=["<box>", ""]).special_strings
    assert "" not in tiny_tokenizer(control=[""]).special_strings


def test_a_template_in_the_older_file_is_found(tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path, template=None)
    assert Tokenizer.load(tmp_path).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 1 }}"}))
    assert Tokenizer.load(tmp_path).chat_template == "{{ 1 }}"


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json, .*; copy the checkpoint"):
        Tokenizer.load(tmp_path)


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match=r"cannot be read \(.*\); fetch the checkpoint's"):
        Tokenizer.load(tmp_path)


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    path.write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert Tokenizer.load(tmp_path).encode("a")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("module", ["tokenizer", "toolcalls", "text_stream"])
def test_the_modules_are_light(module: str) -> None:
    code = (
        f"import sys, lfm2_mm.{module}; "
        "sys.exit(bool({'torch', 'transformers', 'tokenizers', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
