"""Build the documentation site into `build/site`: the Markdown of the repository, and a reference made from docstrings.

`python scripts/build_site.py` (`make site`). Pages are written for a reader of the repository, with links such as
`../tests/test_docs.py`. This gathers them in `build/pages`, those of the root beside those of `docs`, copies the files
that they link to, and hands the folder to the site's builder, which refuses links that lead nowhere.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "build" / "pages"

# Pages of the repository's root, and what they are called in the site.
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "CHANGELOG.md": "CHANGELOG.md",
}

# A link to a file or folder of the repository: no address with a scheme, and no place on the same page.
_LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)")

# Where files that pages link to are copied.
_SOURCE = "source"


def main() -> None:
    gather()
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    sys.exit(subprocess.run(command, cwd=ROOT, check=False).returncode)


def gather() -> None:
    """Write `build/pages`."""
    shutil.rmtree(PAGES, ignore_errors=True)
    PAGES.mkdir(parents=True)
    copied: set[str] = set()
    for source, name in page_names().items():
        text, linked = in_site((ROOT / source).read_text("utf-8"), posixpath.dirname(source))
        (PAGES / name).write_text(text, "utf-8")
        copied |= linked
    for place in sorted(copied):
        target = PAGES / _SOURCE / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / place, target)


def page_names() -> Mapping[str, str]:
    """Every page of the repository, and its name in the site."""
    pages = dict(ROOT_PAGES)
    for file in sorted((ROOT / "docs").glob("*.md")):
        pages[f"docs/{file.name}"] = file.name
    return pages


def in_site(markdown: str, folder: str) -> tuple[str, set[str]]:
    """A page of `folder` with the links of the site, and the files of the repository that it links to."""
    linked: set[str] = set()

    def link(found: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(folder, found[1]))
        anchor = found[2] or ""
        if place in ROOT_PAGES:
            return f"]({ROOT_PAGES[place]}{anchor})"
        if place.startswith("docs/"):
            return f"]({place.removeprefix('docs/')}{anchor})"
        linked.add(place)
        return f"]({_SOURCE}/{place})"

    return _LINK.sub(link, markdown), linked


if __name__ == "__main__":
    main()
