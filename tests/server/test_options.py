"""Where the server may listen, and what `lfm2-mm serve` says to bad options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lfm2_mm.cli import cli
from lfm2_mm.errors import SettingError
from lfm2_mm.server import ServerOptions
from lfm2_mm.server.options import is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]"])
def test_this_machine(host: str) -> None:
    assert is_loopback(host)
    ServerOptions(host=host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_other_addresses_need_a_key(host: str) -> None:
    with pytest.raises(SettingError, match="can be reached from other machines; give --api-key"):
        ServerOptions(host=host)
    assert "a-long-key" not in repr(ServerOptions(host=host, api_key="a-long-key"))


@pytest.mark.parametrize("key", ["short", "with\nnewline", "schlüssel-lang"])
def test_keys_that_cannot_be_used(key: str) -> None:
    with pytest.raises(SettingError, match="use at least 8 printable ASCII characters"):
        ServerOptions(api_key=key)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--host", "0.0.0.0"], 1, "can be reached from other machines"),
        (["--index", "notes"], 1, "--index is 'notes'; write NAME=FOLDER"),
        (["--index", "a=x", "--index", "a=y"], 1, "two indexes are named 'a'"),
        (["--port", "70000"], 2, "70000 is not in the range"),
        (["--tls-cert", __file__], 1, "TLS needs both --tls-cert and --tls-key"),
        (["--tls-cert", __file__, "--tls-key", __file__], 1, "give PEM files that belong together"),
    ],
)
def test_bad_options(arguments: list[str], code: int, text: str) -> None:
    result = CliRunner().invoke(cli, ["serve", *arguments])
    assert result.exit_code == code
    assert text in result.output


def test_a_port_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LFM2_MM_PORT", "many")
    result = CliRunner().invoke(cli, ["serve"])
    assert result.exit_code == 1
    assert "LFM2_MM_PORT is 'many'; give a port from 0 to 65535" in result.output


def test_help_needs_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, lfm2_mm.cli.serve, lfm2_mm.server.options; print('torch' in sys.modules)"
    done: Any = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "False"
