"""A server on the embedded models, and its page in a real browser (`make test-browser`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from lfm2_mm.locate import embedded_models
from lfm2_mm.server import ServerOptions

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.server.running import running  # noqa: E402


def main() -> int:
    """The exit status of the browser's script."""
    browser = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    )
    if browser is None:
        print("test-browser: no Chromium was found; install one or name it with CHROMIUM=…")
        return 2
    documents = ROOT / "retrieval/lfm2_retrieval/samples/documents"
    files = sorted(str(path) for path in documents.iterdir() if path.is_file())
    pictures = ROOT / "docs/images"
    speech = ROOT / "audio/lfm2_audio/samples/klatt3-arithmetic.wav"
    options = ServerOptions(models=tuple(model.name for model in embedded_models()))
    with running(options) as base:
        command = ["node", "rooms.mjs", base, str(pictures), *files]
        heard = {"SPEECH": str(speech), "ANSWER": "six"}
        env = {**heard, **os.environ, "CHROMIUM": browser}
        return subprocess.run(command, cwd=Path(__file__).parent, env=env).returncode


if __name__ == "__main__":
    raise SystemExit(main())
