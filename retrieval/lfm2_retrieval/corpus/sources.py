"""Where the texts come from: pip packages with their licences, and what is held out of training.

Only permissive licences: what is GPL or LGPL is never read. The packages are data here; nothing
of them is imported but Babel. The split was fixed before the first training run.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from importlib.resources import files
from pathlib import Path

from lfm2_mm.errors import MissingExtra

__all__ = [
    "CLDR_LICENCE",
    "HELD_OUT_FRAMES",
    "HELD_OUT_PACKAGES",
    "SOURCES",
    "Source",
    "find_packages",
    "package_files",
    "requirements",
]

CLDR_LICENCE = "Unicode-3.0"
"""Licence of the names in Babel and in `emoji`, which come from CLDR."""


@dataclass(frozen=True, slots=True)
class Source:
    """A pip package whose message catalogs are read.

    Attributes:
        package: Its name.
        licence: SPDX identifier of what is read.
        under: Only files under this folder; packages may carry others' catalogs.
    """

    package: str
    licence: str
    under: str = ""


SOURCES = (
    Source("apache-airflow-core", "Apache-2.0"),
    Source("apache-superset", "Apache-2.0"),
    Source("deform", "BSD-3-Clause-Modification"),
    Source("Django", "BSD-3-Clause"),
    Source("django-allauth", "MIT"),
    Source("django-cms", "BSD-3-Clause"),
    Source("django-countries", "MIT"),
    Source("django-filer", "BSD-3-Clause"),
    Source("django-filter", "BSD-3-Clause"),
    Source("django-helpdesk", "BSD-3-Clause"),
    Source("django-import-export", "BSD-2-Clause"),
    Source("django-localflavor", "BSD-3-Clause"),
    Source("django-machina", "BSD-3-Clause"),
    Source("django-oscar", "BSD-3-Clause"),
    Source("django-two-factor-auth", "MIT"),
    Source("djangorestframework", "BSD-3-Clause"),
    Source("evennia", "BSD-3-Clause"),
    Source("flask-appbuilder", "BSD-3-Clause"),
    Source("Flask-Security-Too", "MIT"),
    Source("holidays", "MIT"),
    Source("home-assistant-frontend", "Apache-2.0"),
    Source("homeassistant", "Apache-2.0", under="homeassistant/components"),
    Source("humanize", "MIT"),
    Source("indico", "MIT", under="indico/translations"),
    *(
        Source(f"jupyterlab-language-pack-{locale}", "BSD-3-Clause")
        for locale in (
            *("ar-SA", "de-DE", "es-ES", "fr-FR", "it-IT"),
            *("ja-JP", "ko-KR", "pt-BR", "ru-RU", "zh-CN"),
        )
    ),
    Source("kolibri", "MIT", under="kolibri/locale"),
    Source("pgadmin4", "PostgreSQL", under="pgadmin4/pgadmin/translations"),
    Source("pydata-sphinx-theme", "BSD-3-Clause"),
    Source("Sphinx", "BSD-2-Clause", under="sphinx/locale"),
    Source("spyder", "MIT", under="spyder/locale"),
    Source("thonny", "MIT", under="thonny/locale"),
    Source("Trac", "BSD-3-Clause", under="trac/locale"),
    Source("wagtail", "BSD-3-Clause"),
    Source("wagtail-localize", "BSD-3-Clause"),
    Source("WTForms", "BSD-3-Clause"),
)
"""The packages whose catalogs are read, in the order in which the first translation wins."""

HELD_OUT_PACKAGES = ("apache-airflow-core", "django-oscar")
"""Packages whose texts are never trained on."""

HELD_OUT_FRAMES = (
    "arrival",
    "capital",
    "course",
    "export",
    "forecast",
    "lost",
    "neighbour",
    "recipe",
    "salary",
    "ticket",
)
"""Sentence frames that are never trained on."""

_LIST = "packages.txt"


def requirements() -> dict[str, str]:
    """Package name to pinned version, from `packages.txt` beside this module."""
    text = (files(__package__) / _LIST).read_text(encoding="utf-8")
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    pairs = (line.partition("==") for line in lines if line)
    return {name: version for name, _, version in pairs}


def find_packages(folders: list[str]) -> dict[str, Distribution]:
    """The installed packages of `packages.txt`, by name.

    Args:
        folders: Where to look: a folder of `pip install --target`, or parts of `sys.path`.

    Raises:
        MissingExtra: if one is not there in the pinned version.
    """
    found = {_plain(d.name): d for d in reversed(list(distributions(path=folders)))}
    chosen = {}
    for name, version in requirements().items():
        have = found.get(_plain(name))
        if have is None or have.version != version:
            seen = "none" if have is None else f"version {have.version}"
            raise MissingExtra(
                f"the training texts need the package {name} {version}, but {seen} is installed; "
                "run `pip install --no-deps --target runs/nano-colbert/packages -r "
                "retrieval/lfm2_retrieval/corpus/packages.txt`"
            )
        chosen[name] = have
    return chosen


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def package_files(found: Distribution, under: str) -> list[tuple[str, Path]]:
    """The files of a package under a folder: their names and where they lie."""
    return [
        (str(file), Path(str(found.locate_file(file))))
        for file in found.files or ()
        if str(file).startswith(under)
    ]
