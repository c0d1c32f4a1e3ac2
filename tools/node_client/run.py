"""A server on the embedded models, and OpenAI's client for node against it (`make test-node`).

Over TLS, with the certificate of the tests: that client opens no realtime socket without.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from lfm2_mm.locate import embedded_models
from lfm2_mm.server import ServerOptions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from tests.server.running import running  # noqa: E402


def main() -> int:
    """The exit status of the client's script."""
    node = shutil.which("node")
    if node is None or not (HERE / "node_modules" / "openai").is_dir():
        print("test-node: node or its packages are missing; install node 20 and run make test-node")
        return 2
    picture = ROOT / "vision/lfm2_vision/examples/simple.png"
    speech = ROOT / "audio/lfm2_audio/samples/mike-open.wav"
    options = ServerOptions(models=tuple(model.name for model in embedded_models()))
    pair: dict[str, Any] = {
        name: ROOT / "tests/server" / f"{name}.pem" for name in ("certificate", "key")
    }
    with running(options, **pair) as base:
        command = [node, "client.mjs", base, str(picture), str(speech)]
        trust = {**os.environ, "NODE_EXTRA_CA_CERTS": str(pair["certificate"])}
        return subprocess.run(command, cwd=HERE, env=trust).returncode


if __name__ == "__main__":
    raise SystemExit(main())
