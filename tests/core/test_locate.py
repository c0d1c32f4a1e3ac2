"""A name becomes a folder, or one sentence says why not; the network is never touched."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils._paths import filter_repo_objects

from lfm2_mm import locate as module
from lfm2_mm.errors import ModelNotFound
from lfm2_mm.locate import (
    KNOWN_MODELS,
    Located,
    cached_models,
    embedded_models,
    locate,
    suggest,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Download = Callable[..., Any]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two embedded models, an empty working folder, an online Hub without a token."""
    pretrained = tmp_path / "pretrained"
    checkpoint(pretrained / "nano-vl")
    checkpoint(pretrained / "nano-audio")
    (pretrained / "__pycache__").mkdir()
    monkeypatch.setattr(module, "_pretrained", lambda: pretrained)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path


def checkpoint(folder: Path, model_type: str = "lfm2_vl") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "model.safetensors").write_bytes(b"12345678")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, home: Path) -> list[dict[str, Any]]:
    """A Hub that has every model; the calls it got."""
    calls: list[dict[str, Any]] = []
    folder = checkpoint(home / "cache" / "snapshots" / COMMIT)

    def download(repo: str, **kwargs: Any) -> str:
        calls.append({"repo": repo, **kwargs})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def failing(
    monkeypatch: pytest.MonkeyPatch, error: Exception, cause: Exception | None = None
) -> None:
    def download(repo: str, **kwargs: Any) -> str:
        raise error from cause

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def http(kind: type[errors.HfHubHTTPError], status: int = 404) -> errors.HfHubHTTPError:
    request = httpx2.Request("GET", "http://hub.invalid/x")
    return kind("two\nlines", response=httpx2.Response(status, request=request))


def refusal(name: str | Path, **kwargs: Any) -> str:
    with pytest.raises(ModelNotFound) as e:
        locate(name, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_embedded(home: Path) -> None:
    assert [m.name for m in embedded_models()] == ["nano-audio", "nano-vl"]
    assert embedded_models()[1].size == 8 + len('{"model_type": "lfm2_vl"}')
    assert locate("nano-vl") == Located(home / "pretrained" / "nano-vl", "nano-vl", "embedded")
    message = '"nano-vl" is embedded and has no revision "v1": leave it out'
    assert refusal("nano-vl@v1") == refusal("nano-vl", revision="v1") == message


def test_the_package_itself_is_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert module._pretrained() == Path(module.__file__).parent / "pretrained"
    assert all((m.folder / "config.json").is_file() for m in embedded_models())


def test_folders(home: Path) -> None:
    folder = checkpoint(home / "work" / "org" / "mine")
    for name in ("org/mine", "./org/mine", str(folder), folder, Path("org/mine")):
        found = locate(name)
        assert found.folder.samefile(folder)
        assert (found.name, found.kind, found.revision) == (os.fspath(name), "folder", None)


def test_folders_that_will_not_do(home: Path) -> None:
    folder = checkpoint(home / "work" / "mine")
    (home / "work" / "empty").mkdir()
    assert refusal("./nothing") == 'there is no folder "./nothing": check the path'
    assert refusal(Path("nothing")) == 'there is no folder "nothing": check the path'
    assert refusal("a/b/c") == 'there is no folder "a/b/c": check the path'
    assert refusal("x.safetensors") == 'there is no folder "x.safetensors": check the path'
    for file in ("config.json", "model.safetensors"):
        assert refusal(f"mine/{file}") == f'"mine/{file}" is a file: give its folder "mine"'
    assert refusal("empty") == (
        'the folder "empty" has no config.json: give a folder that holds a checkpoint'
    )
    assert refusal(".") == 'the folder "." has no config.json: there is one in "mine"'
    assert refusal(folder, revision="main") == (
        f'"{folder}" is a local folder and has no revision "main": leave it out'
    )


def test_hub(hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    found = locate("LiquidAI/LFM2-VL-450M")
    assert (found.name, found.kind, found.revision) == ("LiquidAI/LFM2-VL-450M", "hub", COMMIT)
    assert found.folder.name == COMMIT
    locate("LiquidAI/LFM2-VL-450M@refs/pr/8", offline=True)
    locate("LiquidAI/LFM2-VL-450M", revision="v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    locate("LiquidAI/LFM2-VL-450M@v1", revision="v1")
    assert [c["revision"] for c in hub] == [None, "refs/pr/8", "v1", "v1"]
    assert [c["local_files_only"] for c in hub] == [False, True, False, True]


def test_no_pickle_and_no_code_is_fetched(hub: list[dict[str, Any]]) -> None:
    locate("LiquidAI/LFM2-Audio-1.5B")
    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "1_Dense/model.safetensors",
        "chat_template.jinja",
        "tokenizer.model",
        "pytorch_model.bin",
        "1_Dense/pytorch_model.bin",
        "x.pt",
        "modeling_lfm2.py",
        "model.gguf",
        "onnx/config.json",
        "README.md",
    ]
    kept = filter_repo_objects(
        files, allow_patterns=hub[0]["allow_patterns"], ignore_patterns=hub[0]["ignore_patterns"]
    )
    assert list(kept) == files[:5]


def test_bars_only_on_a_terminal(
    hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for terminal in (False, True):
        monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda t=terminal: t))
        locate("LiquidAI/LFM2-VL-450M")
    assert hub[1]["tqdm_class"] is None
    assert hub[0]["tqdm_class"](total=3, disable=False).disable


def test_names_without_an_organisation_get_the_nearest(hub: list[dict[str, Any]]) -> None:
    for name, near in [
        ("lfm2-vl-450m", "LiquidAI/LFM2-VL-450M"),
        ("LFM2.5-VL-450M", "LiquidAI/LFM2.5-VL-450M"),
        ("LFM2_VL_3B", "LiquidAI/LFM2-VL-3B"),
        ("lfm2-vl-1b", "LiquidAI/LFM2-VL-1.6B"),
        ("nanovl", "nano-vl"),
        ("Nano-Audio", "nano-audio"),
    ]:
        assert refusal(name) == f'no model "{name}": did you mean {near}?'
        assert suggest(name) == near
    assert refusal("gpt2") == (
        'no model "gpt2": use an embedded name (nano-audio, nano-vl), a folder or a Hub id '
        "such as LiquidAI/LFM2.5-VL-450M"
    )
    assert refusal("").startswith('no model "": use an embedded name')
    assert hub == []


def test_revisions_are_checked(hub: list[dict[str, Any]]) -> None:
    assert refusal("a/b@x", revision="y") == 'two revisions for "a/b", "x" and "y": give only one'
    for bad in ("../x", "a/../../b", "", "a b", "/etc/passwd"):
        assert refusal(f"a/b@{bad}") == (
            f'"{bad}" is no revision of "a/b": give a branch, a tag or a commit'
        )
    assert hub == []


@pytest.mark.parametrize(
    ("name", "error", "cause", "message"),
    [
        (
            "liquid/LFM2-VL-450",
            http(errors.RepositoryNotFoundError, 401),
            None,
            'the Hub has no model "liquid/LFM2-VL-450", or it is private: '
            "did you mean LiquidAI/LFM2-VL-450M?",
        ),
        (
            "me/secret-thing",
            http(errors.RepositoryNotFoundError),
            None,
            'the Hub has no model "me/secret-thing", or it is private: '
            "check the id, or set HF_TOKEN to a token that may read it",
        ),
        (
            "a/b",
            http(errors.GatedRepoError, 403),
            None,
            'the Hub model "a/b" is gated: accept its terms on its page, '
            "and set HF_TOKEN to a token of that account",
        ),
        (
            "a/b@v9",
            http(errors.RevisionNotFoundError),
            None,
            'the Hub model "a/b" has no revision "v9": '
            "give a branch, a tag or a commit of it, or leave it out",
        ),
        (
            "a/b@v1",
            errors.LocalEntryNotFoundError("long\ntext"),
            errors.OfflineModeIsEnabled("x"),
            "offline and not in the cache: a/b@v1; "
            "load it once with a network, or use an embedded model such as nano-vl",
        ),
        (
            "a/b",
            errors.LocalEntryNotFoundError("long\ntext"),
            httpx2.ConnectError("no route"),
            "the Hub cannot be reached, and not in the cache: a/b; "
            "load it once with a network, or use an embedded model such as nano-vl",
        ),
        (
            "a/b",
            errors.IncompleteSnapshotError("long", "/x"),
            None,
            "the Hub cannot be reached, and only partly in the cache: a/b; "
            "load it once with a network",
        ),
        (
            "a/b--c",
            errors.HFValidationError("no"),
            None,
            '"a/b--c" is no Hub id: it must look like LiquidAI/LFM2.5-VL-450M',
        ),
        (
            "a/b",
            http(errors.HfHubHTTPError, 503),
            None,
            'the Hub answered 503 for "a/b": try again later',
        ),
        (
            "a/b",
            OSError(28, "No space left on device"),
            None,
            '"a/b" could not be downloaded: No space left on device; '
            "check the network and the free space of HF_HOME",
        ),
        (
            "a/b",
            httpx2.ReadTimeout(""),
            None,
            '"a/b" could not be downloaded: ReadTimeout; '
            "check the network and the free space of HF_HOME",
        ),
    ],
)
def test_failures_of_the_hub(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    error: Exception,
    cause: Exception | None,
    message: str,
) -> None:
    failing(monkeypatch, error, cause)
    assert refusal(name) == message


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    failing(monkeypatch, http(errors.GatedRepoError, 403))
    assert refusal("a/b") == (
        'the Hub model "a/b" is gated: accept its terms on its page, '
        "and the token in HF_TOKEN has no access"
    )


def test_offline_with_the_real_cache_code(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    assert refusal("LiquidAI/LFM2-VL-450M", offline=True) == (
        "offline and not in the cache: LiquidAI/LFM2-VL-450M; "
        "load it once with a network, or use an embedded model such as nano-vl"
    )
    repo = home / "hub" / "models--LiquidAI--LFM2-VL-450M"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    folder = checkpoint(repo / "snapshots" / COMMIT)
    found = locate("LiquidAI/LFM2-VL-450M", offline=True)
    assert found == Located(folder, "LiquidAI/LFM2-VL-450M", "hub", COMMIT)
    (folder / "model.safetensors").unlink()
    assert refusal("LiquidAI/LFM2-VL-450M", offline=True) == (
        "offline and only partly in the cache: LiquidAI/LFM2-VL-450M; load it once with a network"
    )


def test_repositories_of_another_format(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    empty = home / "gguf"
    empty.mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(empty))
    assert refusal("LiquidAI/LFM2-VL-450M-GGUF") == (
        'the Hub model "LiquidAI/LFM2-VL-450M-GGUF" lacks config.json or safetensors weights: '
        "use a checkpoint such as LiquidAI/LFM2-VL-450M"
    )


def test_cached_models(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    cache = home / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert cached_models() == []
    for repo, model_type in [
        ("models--me--tuned", "lfm2"),
        ("models--openai--whisper", "whisper"),
        ("models--LiquidAI--LFM2-Audio-1.5B", ""),
        ("datasets--me--lfm2", "lfm2"),
    ]:
        checkpoint(cache / repo / "snapshots" / COMMIT, model_type)
    broken = cache / "models--me--lfm2-broken" / "snapshots" / COMMIT
    broken.mkdir(parents=True)
    (broken / "config.json").write_text("{")
    found = cached_models()
    assert [(m.id, m.revision) for m in found] == [
        ("LiquidAI/LFM2-Audio-1.5B", COMMIT),
        ("me/tuned", COMMIT),
    ]
    assert found[1].size == 8 + len('{"model_type": "lfm2"}')
    assert found[1].folder.samefile(cache / "models--me--tuned" / "snapshots" / COMMIT)


def test_known_models() -> None:
    ids = [m.id for m in KNOWN_MODELS]
    assert len(set(ids)) == len(ids)
    assert {m.task for m in KNOWN_MODELS} == {"text", "vision", "audio", "retrieval", "embedding"}
    for model in KNOWN_MODELS:
        size = next(p for p in model.id.split("-") if p[-1] in "MB" and p[0].isdigit())
        nominal = float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]
        assert model.parameters == pytest.approx(nominal, rel=0.07)
