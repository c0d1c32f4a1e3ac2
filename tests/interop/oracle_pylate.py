"""Proof that PyLate gives our vectors, scores and rankings, on its files and on those we save.

PyLate pins what this package must not (see docs/adr/0001), so each of its versions runs in an
environment of its own, named by a variable:

    PYLATE_KEEP_PYTHON   PyLate 1.3.4 with transformers 4.56: the states of the expansion are kept
    PYLATE_ZERO_PYTHON   PyLate 1.6.0 with transformers 5.3: they are zeroed

Run by `make test-interop`. The models are tiny, with random weights.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[2]

import numpy as np  # noqa: E402

PEERS = {"keep": "PYLATE_KEEP_PYTHON", "zero": "PYLATE_ZERO_PYTHON"}
VECTORS, SCORES = 1e-5, 1e-4
PLAIN = ("causal", "chain", "attend", "plain")
SAVED = ("causal", "chain", "bidirectional")


def encode(order: str) -> None:
    """In PyLate's environment: write the vectors of all texts, one file per model."""
    wanted = json.loads(Path(order).read_text(encoding="utf-8"))
    for place, out, prompts in wanted["cases"]:
        encode_one(place, out, wanted["queries"], wanted["documents"], prompts)


def encode_one(
    place: str, out: str, queries: list[str], documents: list[str], prompts: bool
) -> None:
    from pylate import models

    net = models.ColBERT(place, device="cpu", trust_remote_code=True)
    sides: list[tuple[str, list[str], dict[str, Any]]] = [
        ("query", queries, {"is_query": True, "batch_size": len(queries)}),
        ("document", documents, {"is_query": False, "batch_size": 1}),
    ]
    vectors = {}
    for side, texts, options in sides:
        if prompts:
            options["prompt_name"] = side
        for i, rows in enumerate(net.encode(texts, **options)):
            vectors[f"{side}{i}"] = np.asarray(rows, np.float32)
    np.savez(out, **vectors)


def scores(vectors: dict[str, Any]) -> Any:
    queries, documents = (
        [vectors[key] for key in sorted(vectors) if key.startswith(side)]
        for side in ("query", "document")
    )
    return np.array([[(q @ d.T).max(1).sum() for d in documents] for q in queries])


def compare(case: str, mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    shapes = mine.keys() == theirs.keys() and all(
        mine[key].shape == theirs[key].shape for key in mine
    )
    if not shapes:
        print(f"  {case}: FAILED, shapes differ")
        return False
    apart = max(float(np.abs(mine[key] - theirs[key]).max()) for key in mine)
    own, other = scores(mine), scores(theirs)
    gap = float(np.abs(own - other).max())
    same = bool((np.argsort(-own, kind="stable") == np.argsort(-other, kind="stable")).all())
    good = apart <= VECTORS and gap <= SCORES and same
    print(
        f"  {case}: {'ok' if good else 'FAILED'}, vectors {apart:.1e}, MaxSim {gap:.1e}, "
        f"rankings {'identical' if same else 'differ'}"
    )
    return good


def main() -> int:
    missing = [name for name in PEERS.values() if not os.environ.get(name)]
    if missing:
        print(f"{' and '.join(missing)} must name the interpreters of PyLate's environments.")
        return 1
    sys.path[:0] = [str(ROOT), str(ROOT / "retrieval")]
    import lfm2_mm

    made = runpy.run_path(str(ROOT / "tests" / "retrieval" / "colbert_checkpoints.py"))
    documents = made["DOCUMENTS"]
    # an empty text after a prompt: PyLate strips the prompt too, sentence-transformers 6 does not
    queries = [text for text in made["QUERIES"] if text]
    good = True
    with tempfile.TemporaryDirectory() as home:
        cases = [(name, made["folder"](name)) for name in PLAIN]
        for name in SAVED:
            place = Path(home) / f"saved-{name}"
            lfm2_mm.load(made["folder"](name), threads=1).save(place)
            cases.append((place.name, place))
        order = Path(home) / "order.json"
        for states, variable in PEERS.items():
            print(f"{variable}: expansion states {states}")
            # PyLate 1.3.4 does not know that a prefix may be empty
            some = [(name, at) for name, at in cases if states == "zero" or name != "plain"]
            outs = [str(Path(home) / f"{name}.npz") for name, _ in some]
            jobs = [
                (str(at), out, name == "plain") for (name, at), out in zip(some, outs, strict=True)
            ]
            texts = {"queries": queries, "documents": documents, "cases": jobs}
            order.write_text(json.dumps(texts), encoding="utf-8")
            run = subprocess.run(
                [os.environ[variable], __file__, "encode", str(order)],
                env={**os.environ, "PYTHONPATH": "", "HF_HOME": home},
                capture_output=True,
                text=True,
            )
            if run.returncode:
                last = (run.stderr.strip() or "no message").splitlines()[-1]
                print(f"  FAILED, PyLate stopped: {last}")
                good = False
                continue
            for (case, place), out in zip(some, outs, strict=True):
                # our bidirectional file for transformers leaves its convolutions unmasked
                mode = "keep" if "bidirectional" in case else states
                net = lfm2_mm.load(place, threads=1, expansion_states=mode)
                sides = {
                    "query": net.encode_queries(queries),
                    "document": net.encode_documents(documents),
                }
                mine = {
                    f"{side}{i}": rows.numpy()
                    for side, found in sides.items()
                    for i, rows in enumerate(found)
                }
                good &= compare(case, mine, dict(np.load(out)))
    print("PyLate agrees with us." if good else "PyLate and we differ.")
    return 0 if good else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["encode"]:
        encode(sys.argv[2])
    else:
        sys.exit(main())
