"""What was built, looked at: links and anchors lead somewhere, and nothing comes from elsewhere.

python docs/sitetools/check_site.py build/docs
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

REMOTE = re.compile(r"^(?:https?:)?//", re.I)
FETCHED = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}
NAVIGATED = {"canonical", "next", "prev"}
CSS = re.compile(r"(?:@import\s+|url\()\s*['\"]?\s*((?:https?:)?//[^'\")\s]+)", re.I)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {k: v or "" for k, v in attrs}
        self.ids |= {values[k] for k in ("id", "name") if values.get(k)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        place = FETCHED.get(tag)
        if place and values.get(place) and not NAVIGATED & set(values.get("rel", "").split()):
            self.fetched.append(values[place])


def problems(site: Path) -> list[str]:
    """Sentences, one for each thing wrong."""
    pages = {file: _parsed(file) for file in sorted(site.rglob("*.html"))}
    found = [] if pages else [f"{site}: no page was built"]
    for file, page in pages.items():
        name = file.relative_to(site).as_posix()
        found += [f"{name}: fetches {u}" for u in page.fetched if REMOTE.match(u)]
        for link in [*page.links, *page.fetched]:
            found += [f"{name}: {reason}" for reason in _broken(link, file, site, pages)]
        if re.search(r"(?:merror|@@output|@@table)", file.read_text()):
            found.append(f"{name}: an equation or a mark was left as it was")
    for file in site.rglob("*.css"):
        found += [f"{file.name}: fetches {u}" for u in CSS.findall(file.read_text())]
    return found


def _parsed(file: Path) -> _Page:
    page = _Page()
    page.feed(file.read_text())
    return page


def _broken(link: str, file: Path, site: Path, pages: dict[Path, _Page]) -> list[str]:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return []
    if file.name == "404.html" or link.startswith("/"):
        return [] if file.name == "404.html" else [f"absolute link {link}"]
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    if target.is_dir():
        target /= "index.html"
    if not target.is_relative_to(site.resolve()) or not target.exists():
        return [f"link {link} leads nowhere"]
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].ids:
        return [f"link {link} has no such anchor"]
    return []


def main(argv: list[str]) -> int:
    site = Path(argv[0]).resolve()
    found = problems(site)
    pages = len(list(site.rglob("*.html")))
    sys.stdout.write("".join(f"{line}\n" for line in found))
    sys.stdout.write(f"{site.name}: {pages} pages, {len(found)} problems\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
