"""`python -m lfm2_retrieval.corpus FOLDER`: build the texts from the packages in FOLDER/packages.

Writes both halves into FOLDER. The held-out half that counts is the committed one, beside this
module.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lfm2_mm.errors import Lfm2Error
from lfm2_retrieval.corpus.build import CORPUS, HELD_OUT, build, write


def main() -> int:
    """Build and write; 1 if a package is missing, 2 without a folder."""
    if len(sys.argv) != 2:
        print("usage: python -m lfm2_retrieval.corpus FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    try:
        train, apart = build([str(folder / "packages"), *sys.path])
    except Lfm2Error as error:
        print(error, file=sys.stderr)
        return 1
    for name, concepts in ((CORPUS, train), (HELD_OUT, apart)):
        write(folder / name, concepts)
        print(f"{folder / name}: {len(concepts):,} concepts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
