"""Side files of every layout, the defaults of absent keys, and what is refused with which words."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest

import lfm2_mm
from lfm2_mm.checkpoint import Checkpoint
from lfm2_mm.errors import CheckpointError, CorruptWeights, Lfm2Error, SettingError
from lfm2_mm.frontends import frontends
from lfm2_retrieval.frontend import RetrievalFrontend
from lfm2_retrieval.layout import Expansion, RetrieverSpec, is_bidirectional, read_spec
from tests.retrieval.colbert_checkpoints import dump, edit, folder, module, write


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write(tmp_path / "it", "causal")
    return tmp_path / "it"


def test_the_official_layout() -> None:
    spec = read_spec(folder("causal"), {})
    assert (spec.kind, spec.query_prefix, spec.document_prefix) == (
        "late-interaction",
        "[Q] ",
        "[D] ",
    )
    assert (spec.query_length, spec.document_length) == (32, 256)
    assert spec.expansion == Expansion(length=32, attend=False)
    assert spec.skiplist == tuple(string.punctuation)
    assert [(d.folder, d.in_features, d.out_features) for d in spec.dense] == [("1_Dense", 64, 32)]
    chain = read_spec(folder("chain"), {}).dense
    assert [d.activation for d in chain] == ["Tanh", "GELU", "Identity"]
    assert [d.residual for d in chain] == [True, True, False]


def test_absent_keys_have_pylates_defaults(place: Path) -> None:
    dump({}, place / "config_sentence_transformers.json")
    bare = RetrieverSpec(dense=read_spec(place, {}).dense)
    assert read_spec(place, {}) == bare
    assert (bare.query_length, bare.document_length) == (32, 180)
    (place / "config_sentence_transformers.json").unlink()
    assert read_spec(place, {}) == bare


def test_the_embedding_layout() -> None:
    config = json.loads((folder("embedding") / "config.json").read_text())
    spec = read_spec(folder("embedding"), config)
    assert (spec.kind, spec.pooling, spec.bidirectional) == ("dense", "cls", True)
    assert (spec.query_prompt, spec.document_prompt) == ("query: ", "document: ")
    assert (spec.query_length, spec.expansion, spec.dense) == (128, None, ())


@pytest.mark.parametrize(
    ("config", "both"),
    [
        ({"architectures": ["Lfm2Model"]}, False),
        ({"architectures": ["Lfm2BidirectionalModel"]}, True),
        ({"architectures": ["Lfm2BidirModel"], "is_causal": True}, False),
        ({"is_causal": False}, True),
        ({"architectures": None}, False),
    ],
)
def test_who_sees_both_sides(config: dict[str, Any], both: bool) -> None:
    assert is_bidirectional(config) is both


def test_the_frontend_claims_by_modules_json(place: Path) -> None:
    assert any(isinstance(found, RetrievalFrontend) for found in frontends())
    assert RetrievalFrontend().claims(Checkpoint.open(place))
    (place / "modules.json").unlink()
    assert not RetrievalFrontend().claims(Checkpoint.open(place))
    assert type(lfm2_mm.load(place, threads=1)).__name__ == "Model"


def refusal(place: Path, error: type[Lfm2Error], **options: Any) -> str:
    with pytest.raises(error) as caught:
        lfm2_mm.load(place, threads=1, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    "kind", ["os.system", "sentence_transformers.models.CNN", "my_code.Dense", "Dense"]
)
def test_modules_outside_the_list_are_refused(place: Path, kind: str) -> None:
    dump(
        [
            module(0, "", "sentence_transformers.models.Transformer"),
            module(1, "1_Dense", kind),
        ],
        place / "modules.json",
    )
    said = refusal(place, CheckpointError)
    assert repr(kind) in said and "no code named by a checkpoint is run" in said


def test_the_transformer_comes_first(place: Path) -> None:
    dump([module(0, "1_Dense", "pylate.models.Dense.Dense")], place / "modules.json")
    assert "exactly one Transformer" in refusal(place, CheckpointError)


@pytest.mark.parametrize("activation", ["os.system", "torch.nn.Bilinear", "torch.load"])
def test_activations_outside_the_list_are_refused(place: Path, activation: str) -> None:
    edit(place, "1_Dense/config.json", activation_function=activation)
    said = refusal(place, CheckpointError)
    assert repr(activation) in said and "Identity" in said


def test_pickled_weights_are_refused_by_name(place: Path) -> None:
    weights = place / "1_Dense" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    said = refusal(place, CorruptWeights)
    assert "pytorch_model.bin" in said and "never read" in said and "1_Dense" in said
    weights.with_name("pytorch_model.bin").unlink()
    assert "model.safetensors is missing" in refusal(place, CorruptWeights)
    weights.write_bytes(b"not weights")
    assert "cannot be read as safetensors" in refusal(place, CorruptWeights)


@pytest.mark.parametrize("path", ["/etc", "../other", "a\\b"])
def test_modules_stay_inside_the_folder(place: Path, path: str) -> None:
    dump(
        [
            module(0, "", "sentence_transformers.models.Transformer"),
            module(1, path, "pylate.models.Dense.Dense"),
        ],
        place / "modules.json",
    )
    assert "outside its folder" in refusal(place, CheckpointError)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config_sentence_transformers.json", {"query_length": 2}, "query_length = 2"),
        ("config_sentence_transformers.json", {"query_length": "many"}, "wrong kind"),
        ("config_sentence_transformers.json", {"prompts": 3}, "wrong kind"),
        ("config_sentence_transformers.json", {"query_prefix": "[?] "}, "'[?] '"),
        ("1_Dense/config.json", {"in_features": None}, "in_features"),
        ("1_Dense/config.json", {"in_features": 63}, "takes 63"),
        ("1_Dense/config.json", {"out_features": 31}, "do not fit"),
        ("1_Dense/config.json", {"bias": True}, "do not fit"),
    ],
)
def test_settings_that_cannot_be(
    place: Path, file: str, changes: dict[str, Any], words: str
) -> None:
    edit(place, file, **changes)
    assert words in refusal(place, CheckpointError)


def test_files_that_are_not_what_they_should_be(place: Path) -> None:
    (place / "modules.json").write_text("{")
    assert "not readable JSON" in refusal(place, CheckpointError)
    dump({}, place / "modules.json")
    assert "no list of modules" in refusal(place, CheckpointError)
    dump(["Dense"], place / "modules.json")
    assert "wrong kind" in refusal(place, CheckpointError)


@pytest.mark.parametrize("mode", ["max", "weightedmean", ["cls", "mean"]])
def test_pooling_that_is_not_supported(tmp_path: Path, mode: Any) -> None:
    write(tmp_path / "it", "embedding")
    dump({"pooling_mode": mode}, tmp_path / "it" / "1_Pooling" / "config.json")
    assert "cls, mean, lasttoken" in refusal(tmp_path / "it", CheckpointError)


def test_options(place: Path) -> None:
    said = refusal(place, SettingError, expansion_states="drop")
    assert said == "expansion_states is 'drop'; use 'keep' or 'zero'"
    assert "expansion_states" in refusal(place, SettingError, max_tiles=3)
