"""One side of a search comparison, in a process of its own: it stores vectors and is asked.

Run as a script by an interpreter that has what the side needs (`python searchers.py qdrant` needs
numpy and qdrant-client, and nothing of ours). One JSON object a line on stdin, one a line on
stdout: `build`, `load`, `search`, `answer`. Vectors come from files: `vectors.f2` (fp16 rows behind
each other), `lengths.npy`, `queries.npy`. Knows no other side and no rounds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import numpy as np

__all__ = ["SIDES", "Corpus", "Side", "serve"]

Numbers = Any  # a numpy array


class Corpus:
    """What all sides store and are asked.

    Args:
        folder: Holds the three files.
    """

    def __init__(self, folder: str) -> None:
        where = Path(folder)
        self.lengths = np.load(where / "lengths.npy")
        self.queries = np.load(where / "queries.npy")
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        dim = self.queries.shape[-1]
        self._path = where / "vectors.f2"
        # the file may be a larger corpus's, which begins with this one
        self.rows = np.memmap(self._path, "<f2", "r").reshape(-1, dim)[: self.offsets[-1]]

    def __len__(self) -> int:
        return len(self.lengths)

    def query(self, number: int) -> Numbers:
        """The rows of a query, without the zeros that fill it up."""
        rows = self.queries[number]
        return np.ascontiguousarray(rows[: int(np.flatnonzero(rows.any(1))[-1]) + 1])

    def blocks(self, size: int) -> Iterator[tuple[int, list[Numbers]]]:
        """Passages in blocks: number of the first, and the fp32 rows of each."""
        for first in range(0, len(self), size):
            last = min(first + size, len(self))
            begin, end = self.offsets[first], self.offsets[last]
            # read, not mapped: what is mapped would count as the side's memory
            dim = self.queries.shape[-1]
            count, skip = int(end - begin) * dim, int(begin) * dim * 2
            rows = np.fromfile(self._path, "<f2", count, offset=skip).reshape(-1, dim)
            rows = rows.astype(np.float32)
            yield first, np.split(rows, self.offsets[first + 1 : last] - begin)


class Side(ABC):
    """A library under measurement; `folder` is its own, for what it stores."""

    stores = False
    """Whether it has anything to build."""

    def build(self, corpus: Corpus, folder: Path) -> dict[str, float]:
        """Store a corpus in a folder; more facts about what is stored."""
        return {}

    @abstractmethod
    def load(self, corpus: Corpus, folder: Path, model: str | None) -> dict[str, str]:
        """Make ready to be asked; versions."""

    @abstractmethod
    def search(self, query: Numbers, k: int) -> list[int]:
        """Numbers of the best passages for query rows [q, d], best first."""


class Ours(Side):
    """lfm2_mm, through its public face."""

    stores = True

    def build(self, corpus: Corpus, folder: Path) -> dict[str, float]:
        """See `Side.build`."""
        from lfm2_retrieval import Index

        with Index.open(folder / "index") as index, index.bulk():
            for first, rows in corpus.blocks(1000):
                ids = [str(first + number) for number in range(len(rows))]
                index.add_vectors(rows, [""] * len(rows), ids)
        status = index_status(folder)
        return {"bytes_per_token": status.bytes_per_token, "centroids": status.centroids}

    def load(self, corpus: Corpus, folder: Path, model: str | None) -> dict[str, str]:
        """See `Side.load`."""
        import torch

        import lfm2_mm
        from lfm2_retrieval import Index

        self.index = Index.open(folder / "index", read_only=True)
        self.model: Any = lfm2_mm.load(model) if model else None
        return {"lfm2_mm": lfm2_mm.__version__, "torch": str(torch.__version__)}

    def search(self, query: Numbers, k: int) -> list[int]:
        """See `Side.search`."""
        return [int(id.partition("#")[0]) for id, _ in self.index.search_vectors(query, k)]

    def answer(self, query: str, k: int) -> None:
        """Search for a text, the model included."""
        self.index.search_vectors(self.model.encode_queries([query])[0], k)


def index_status(folder: Path) -> Any:
    """The status of our index."""
    from lfm2_retrieval import Index

    with Index.open(folder / "index", read_only=True) as index:
        return index.status()


class Exact(Side):
    """All passages, block by block, with torch; the vectors stay on disk in fp16."""

    def load(self, corpus: Corpus, folder: Path, model: str | None) -> dict[str, str]:
        """See `Side.load`."""
        import torch

        self.torch, self.corpus = torch, corpus
        return {"torch": str(torch.__version__)}

    def search(self, query: Numbers, k: int) -> list[int]:
        """See `Side.search`."""
        torch, corpus = self.torch, self.corpus
        columns = torch.from_numpy(query)
        scores = np.empty(len(corpus), np.float32)
        for first in range(0, len(corpus), 1000):
            last = min(first + 1000, len(corpus))
            offsets = corpus.offsets[first : last + 1]
            block = torch.from_numpy(np.array(corpus.rows[offsets[0] : offsets[-1]]))
            found = (columns @ block.float().T).numpy()
            best = np.maximum.reduceat(found, offsets[:-1] - offsets[0], axis=1)
            scores[first:last] = best.sum(0)
        return best_of(scores, k)


class Numpy(Side):
    """All passages with numpy; the vectors are in memory in fp32."""

    def load(self, corpus: Corpus, folder: Path, model: str | None) -> dict[str, str]:
        """See `Side.load`."""
        self.rows = np.ascontiguousarray(corpus.rows.astype(np.float32).T)
        self.begins = corpus.offsets[:-1]
        return {"numpy": np.__version__}

    def search(self, query: Numbers, k: int) -> list[int]:
        """See `Side.search`."""
        best = np.maximum.reduceat(query @ self.rows, self.begins, axis=1)
        return best_of(best.sum(0), k)


class SentenceTransformers(Side):
    """sentence-transformers' `maxsim`; the vectors are in memory in fp32."""

    def load(self, corpus: Corpus, folder: Path, model: str | None) -> dict[str, str]:
        """See `Side.load`."""
        library: Any = import_module("sentence_transformers")
        self.maxsim = import_module("sentence_transformers.util").maxsim
        torch: Any = import_module("torch")
        self.to_tensor = torch.from_numpy
        self.rows = [self.to_tensor(one) for _, rows in corpus.blocks(1000) for one in rows]
        return {"sentence-transformers": str(library.__version__)}

    def search(self, query: Numbers, k: int) -> list[int]:
        """See `Side.search`."""
        return best_of(self.maxsim(self.to_tensor(query), self.rows)[0].numpy(), k)


class LanceDB(Side):
    """LanceDB with multivectors, without an approximate index (the vectors are in fp32)."""

    stores = True

    def build(self, corpus: Corpus, folder: Path) -> dict[str, float]:
        """See `Side.build`."""
        lancedb: Any = import_module("lancedb")
        arrow: Any = import_module("pyarrow")
        dim = corpus.queries.shape[-1]
        kind = arrow.list_(arrow.list_(arrow.float32(), dim))
        schema = arrow.schema([("id", arrow.int64()), ("vector", kind)])

        def batches() -> Iterator[Any]:
            for first, rows in corpus.blocks(1000):
                ids = arrow.array(range(first, first + len(rows)))
                values = arrow.array([one.tolist() for one in rows], kind)
                yield arrow.RecordBatch.from_arrays([ids, values], schema=schema)

        lancedb.connect(folder / "lance").create_table("t", data=batches(), schema=schema)
        return {}

    def load(self, corpus: Corpus, folder: Path, model: str | None) -> dict[str, str]:
        """See `Side.load`."""
        lancedb: Any = import_module("lancedb")
        self.table = lancedb.connect(folder / "lance").open_table("t")
        return {"lancedb": str(lancedb.__version__)}

    def search(self, query: Numbers, k: int) -> list[int]:
        """See `Side.search`."""
        asked = self.table.search(list(query), vector_column_name="vector")
        found = asked.distance_type("cosine").select(["id"]).limit(k).to_list()
        return [int(row["id"]) for row in found]


class Qdrant(Side):
    """Qdrant's local mode: brute force in memory."""

    def load(self, corpus: Corpus, folder: Path, model: str | None) -> dict[str, str]:
        """See `Side.load`."""
        from importlib.metadata import version

        qdrant: Any = import_module("qdrant_client")
        models = qdrant.models
        self.client = qdrant.QdrantClient(":memory:")
        comparator = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
        self.client.create_collection(
            "t",
            vectors_config=models.VectorParams(
                size=corpus.queries.shape[-1],
                distance=models.Distance.DOT,
                multivector_config=comparator,
            ),
        )
        for first, rows in corpus.blocks(500):
            points = [
                models.PointStruct(id=first + number, vector=one.tolist())
                for number, one in enumerate(rows)
            ]
            self.client.upsert("t", points)
        return {"qdrant-client": version("qdrant-client")}

    def search(self, query: Numbers, k: int) -> list[int]:
        """See `Side.search`."""
        found = self.client.query_points("t", query=query.tolist(), limit=k).points
        return [int(point.id) for point in found]


SIDES: dict[str, Callable[[], Side]] = {
    "lfm2_mm": Ours,
    "exact": Exact,
    "numpy": Numpy,
    "sentence-transformers": SentenceTransformers,
    "lancedb": LanceDB,
    "qdrant": Qdrant,
}


def best_of(scores: Numbers, k: int) -> list[int]:
    """Places of the k greatest, greatest first."""
    chosen = np.argpartition(-scores, min(k, len(scores) - 1))[:k]
    return [int(one) for one in chosen[np.argsort(-scores[chosen], kind="stable")]]


def serve(side: Side, requests: TextIO, answers: TextIO, peak_bytes: Callable[[], int]) -> None:
    """Answer requests until there are no more; a failure is an answer, too."""
    corpus: Any = None
    for line in requests:
        request = json.loads(line)
        verb = request.pop("do")
        try:
            began, computed, faults = time.perf_counter(), time.process_time(), _faults()
            answer: dict[str, Any] = {}
            if verb in ("build", "load"):
                corpus = corpus or Corpus(request["corpus"])
                where = Path(request["folder"])
                if verb == "build":
                    answer["facts"] = side.build(corpus, where)
                else:
                    answer["versions"] = side.load(corpus, where, request.get("model"))
            elif verb == "search":
                answer["found"] = side.search(corpus.query(request["query"]), request["k"])
            elif verb == "answer" and isinstance(side, Ours):
                side.answer(request["text"], request["k"])
            else:
                answer["error"] = f"there is no request {verb!r}"
            answer["seconds"] = time.perf_counter() - began
            answer["cpu_seconds"] = time.process_time() - computed
            answer["faults"] = _faults() - faults
            answer["peak_bytes"] = peak_bytes()
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _faults() -> int:
    """Page faults of this process so far that waited for the disk; 0 where that is not told."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def main() -> None:
    """Be the side that the first argument names, with the threads that the second says."""
    here = str(Path(__file__).parent)
    sys.path[:] = [here, *(entry for entry in sys.path if entry != here)]
    peak_bytes = import_module("workers").peak_bytes  # its neighbour needs nothing of ours either

    sys.path[:] = [entry for entry in sys.path if entry != here]
    if sys.argv[1] in ("lfm2_mm", "exact", "sentence-transformers"):
        import torch

        torch.set_num_threads(int(sys.argv[2]))
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print must not stand between the answers
        serve(SIDES[sys.argv[1]](), sys.stdin, answers, peak_bytes)


if __name__ == "__main__":
    main()
