"""The house rules that no linter knows: what is shipped, what is pinned, how modules look."""

from __future__ import annotations

import ast
import os
import re
import socket
import subprocess
import sys
import tomllib
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = [
    ROOT / "lfm2_mm",
    ROOT / "vision" / "lfm2_vision",
    ROOT / "audio" / "lfm2_audio",
    ROOT / "retrieval" / "lfm2_retrieval",
    ROOT / "evals" / "lfm2_evals",
]
# Beside the pinned torch they break transformers' LFM2 classes, or have no build at all.
FORBIDDEN = {"torchvision", "torchaudio", "timm", "open-clip-torch", "open-clip", "pylate"}
MAX_LINES = 450


@cache
def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    return dict(table["project"])


def package_names(requirements: list[str]) -> set[str]:
    """The normalised package names of some requirement lines."""
    heads = (re.match(r"[A-Za-z0-9._-]+", line) for line in requirements)
    return {re.sub(r"[-_.]+", "-", head[0]).lower() for head in heads if head}


@cache
def constraints() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in package.rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), filename=str(path))


def tool(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    spec = spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- what is installed ----


@pytest.mark.parametrize("extra", ["", "all"])
def test_no_install_brings_a_package_that_breaks_the_pinned_torch(extra: str) -> None:
    wanted = project()["optional-dependencies"][extra] if extra else project()["dependencies"]
    assert not package_names(wanted) & FORBIDDEN


def test_the_resolved_set_holds_no_package_that_breaks_the_pinned_torch() -> None:
    assert not package_names(constraints()) & FORBIDDEN


def test_constraints_pin_torch_exactly() -> None:
    assert "torch==2.13.0" in constraints()


def test_constraints_are_exact_pins_that_fit_every_platform() -> None:
    loose = [line for line in constraints() if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    assert loose == []


def test_every_requirement_is_pinned() -> None:
    wanted = project()["dependencies"] + project()["optional-dependencies"]["dev"]
    assert package_names(wanted) - package_names(constraints()) == set()


def test_every_entry_point_names_an_object_of_a_module_that_exists() -> None:
    points = [project()["scripts"], *project()["entry-points"].values()]
    for target in (value for group in points for value in group.values()):
        module, _, attribute = target.partition(":")
        top, *rest = module.split(".")
        package = next(package for package in PACKAGES if package.name == top)
        at = package.joinpath(*rest)
        source = at / "__init__.py" if at.is_dir() else at.with_suffix(".py")
        assert source.is_file(), f"{target}: there is no {relative(source)}"
        assert re.search(rf"\b{attribute}\b", source.read_text("utf-8")), target


def test_lock_cuts_local_versions_and_leaves_out_what_only_cuda_builds_bring() -> None:
    freeze = "torch==2.13.0+cpu\nnvidia-cublas==13.1\nclick==8.5.1\n"
    assert tool("lock").pins(freeze) == ["click==8.5.1", "torch==2.13.0"]


def test_lock_refuses_what_is_no_exact_pin() -> None:
    with pytest.raises(SystemExit, match="'six @ file:six.whl' is no exact pin: install it from"):
        tool("lock").pins("six @ file:six.whl")


# ---- what is shipped ----


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_every_package_is_typed_and_says_what_it_is(package: Path) -> None:
    assert (package / "py.typed").is_file()
    assert (package / "__init__.py").is_file()


def wheel_names() -> list[str]:
    names = [f"{package.name}/py.typed" for package in PACKAGES]
    return [*names, "lfm2_mm/pretrained/nano/model.safetensors", "lfm2_vision/demo/a.png"]


def test_the_wheel_check_passes_what_is_complete() -> None:
    names = wheel_names()
    packed = [*names, "lfm2_mm-0.1.0.dist-info/RECORD"]
    assert tool("wheel_smoke").problems(packed, ["lfm2_mm-0.1.0/Makefile"], set(names)) == []


@pytest.mark.parametrize("lost", [0, 4, 5, 6])
def test_the_wheel_check_names_what_is_missing(lost: int) -> None:
    names = wheel_names()
    gone = names.pop(lost)
    found = tool("wheel_smoke").problems(names, [], {*names, gone})
    assert f"the wheel lacks {gone}." in found
    assert len(found) == 2


def test_the_wheel_check_names_what_does_not_belong() -> None:
    names = wheel_names()
    sdist = ["lfm2_mm-0.1.0/.venv/pyvenv.cfg", "lfm2_mm-0.1.0/runs/a/step.safetensors"]
    found = tool("wheel_smoke").problems([*names, "lfm2_mm/junk"], sdist, set(names))
    assert found == [
        "the wheel holds lfm2_mm/junk, which is not in the tree.",
        "the sdist holds lfm2_mm-0.1.0/.venv/pyvenv.cfg.",
        "the sdist holds lfm2_mm-0.1.0/runs/a/step.safetensors.",
    ]


def test_the_newest_release_of_the_changelog_is_the_version() -> None:
    releases = re.findall(
        r"^## \[(\d[^\]]*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M
    )
    source = (ROOT / "lfm2_mm" / "__init__.py").read_text("utf-8")
    version = re.search(r'^__version__ = "([^"]+)"$', source, re.M)
    assert version is not None
    assert releases[0] == version[1]


# ---- how modules look ----


def test_there_are_modules_to_look_at() -> None:
    assert {path.name for path in modules()} >= {"__init__.py", "errors.py", "frontends.py"}


def test_every_module_opens_with_a_docstring() -> None:
    assert [relative(p) for p in modules() if not ast.get_docstring(tree_of(p))] == []


def test_no_module_is_longer_than_a_reader_can_hold() -> None:
    lengths = {relative(p): len(p.read_text("utf-8").splitlines()) for p in modules()}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


# ---- what is written ----


def text_files() -> list[Path]:
    """Every text file of the repository that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = (ROOT / name for name in names.split("\0") if name)
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:8192]]


def machine_paths(text: str) -> list[str]:
    """Absolute paths of somebody's machine, such as a home folder."""
    return re.findall(r"(?<![\w./~:-])/(?:home|root|tmp|work|Users)/[\w.-]+", text)


def test_machine_paths_are_recognised() -> None:
    path = "/" + "home/ann"
    assert machine_paths(f"cd {path}/x; open('{path}')") == [path, path]
    assert machine_paths(f"https://example.org{path} tests{path} ~{path}") == []


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    found = {relative(p): machine_paths(p.read_text("utf-8", "replace")) for p in text_files()}
    assert {name: paths for name, paths in found.items() if paths} == {}


# ---- the two commands ----


def make(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    command = ["make", "--no-print-directory", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def interpreter(folder: Path, *, version_ok: bool, venv_ok: bool) -> Path:
    """A stand-in for python3 that answers the questions the Makefile asks."""
    script = folder / "python3"
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f"  *version_info*) exit {int(not version_ok)} ;;\n"
        f"  *ensurepip*) exit {int(not venv_ok)} ;;\n"
        '  --version) echo "Python 3.9.2" ;;\n'
        "esac\n"
    )
    script.chmod(0o755)
    return script


def test_make_alone_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert phony is not None
    listed = re.findall(r"^  make ([a-z-]+) +\S", make().stdout, re.M)
    assert sorted(listed) == sorted(phony[1].split())


def test_make_says_which_python_is_missing(tmp_path: Path) -> None:
    done = make("demo", f"VENV={tmp_path / 'venv'}", "PYTHON=python-of-nowhere")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == (
        "make: no interpreter python-of-nowhere was found: "
        "install Python 3.11 or newer, or name one with PYTHON=…"
    )


def test_make_says_which_python_is_too_old(tmp_path: Path) -> None:
    python = interpreter(tmp_path, version_ok=False, venv_ok=True)
    done = make("demo", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == (
        f"make: {python} is Python 3.9.2, but lfm2_mm needs 3.11 or newer: name one with PYTHON=…"
    )


def test_make_says_how_to_get_the_venv_module(tmp_path: Path) -> None:
    python = interpreter(tmp_path, version_ok=True, venv_ok=False)
    done = make("demo", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == (
        f"make: {python} cannot make environments: "
        "install its venv module (Debian, Ubuntu: apt install python3-venv)."
    )


# ---- the tests' own guards ----


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("2001:db8::1", 80)])
def test_a_test_cannot_reach_another_machine(address: tuple[str, int]) -> None:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as one, pytest.raises(RuntimeError, match="tried to connect to"):
        one.connect(address)


def test_a_test_cannot_look_up_another_machine() -> None:
    with pytest.raises(RuntimeError, match="tried to look up 'example.org'"):
        socket.create_connection(("example.org", 80))


def test_a_test_can_reach_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("localhost", port)) as client:
            assert client.getpeername()[1] == port


def test_shapes_are_checked_while_tests_run() -> None:
    import torch
    from jaxtyping import TypeCheckError

    from lfm2_mm.operators import RMSNorm

    norm = RMSNorm(4, 1e-5)
    assert norm(torch.zeros(2, 4)).shape == (2, 4)
    with pytest.raises(TypeCheckError, match="problem arose whilst typechecking parameter 'x'"):
        norm(torch.zeros(2, 4, dtype=torch.int64))


def test_the_users_folders_are_out_of_reach(isolated: Path) -> None:
    from platformdirs import user_cache_dir, user_config_dir

    assert Path(user_config_dir("lfm2-mm")).is_relative_to(isolated)
    assert Path(user_cache_dir("lfm2-mm")).is_relative_to(isolated)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_torch_runs_on_one_thread() -> None:
    import torch

    assert torch.get_num_threads() == 1


def test_python_is_new_enough_for_the_pins() -> None:
    assert project()["requires-python"] == ">=3.11"
    assert sys.version_info >= (3, 11)
