"""The site of docs/ builds without a warning, needs nothing from elsewhere, and holds all that is public."""

from __future__ import annotations

import ast
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.browser import Browser

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs/reference").glob("*.md"))
ROOMS = sorted(path.parent.name for path in (ROOT / "crossdock").glob("*/__init__.py") if path.stat().st_size)
WITHOUT_PAGE = {"cli": "`docs/commands.md` is its page"}


def public_names(page: Path) -> dict[str, list[str]]:
    """`__all__` of each module that a page of the reference is of; nothing is imported."""
    found = {}
    for module in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
        stem = ROOT / module.replace(".", "/")
        path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
        if path.is_file():  # else one name of a module
            (names,) = (
                node.value
                for node in ast.parse(path.read_text()).body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            )
            found[module] = ast.literal_eval(names)
    return found


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """What CONTRIBUTING.md says, of the checkout in `root`."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    result = build(ROOT, folder)
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    for path in (ROOT / "docs").rglob("*.md"):
        place = path.relative_to(ROOT / "docs").with_suffix("")
        assert (site / (place.parent if place.name == "index" else place) / "index.html").is_file()


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert not re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*", path.read_text()
        )
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", path.read_text())


def test_rooms_have_pages_of_reference() -> None:
    modules = {module for page in PAGES for module in public_names(page)}
    for room in ROOMS:
        parts = [module for module in modules if f"{module}.".startswith(f"crossdock.{room}.")]
        assert parts or room in WITHOUT_PAGE, room


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_reference_has_every_public_name(site: Path, page: Path) -> None:
    place = site / "reference" / ("" if page.stem == "index" else page.stem)
    html = (place / "index.html").read_text()
    for module, names in public_names(page).items():
        # A function is elsewhere, too, where a module of its name hides it.
        shown = {name for name in names if re.search(rf'id="crossdock[\w.]*\.{name}"', html)}
        assert set(names) - shown <= {"__version__"}, f"{module}: without a docstring"


PAGE = "# Home\n\n{}\n"
CASES = {
    "a snippet": (
        "{{ source package.room.Layer.forward without docstring }}",
        r"<span class=\"nf\">forward</span>",
        "",
    ),
    "a constant": ("{{ source package.room.TOP }}", r"<span class=\"mi\">8</span>", ""),
    "a snippet that is gone": ("{{ source package.room.Layer.backward }}", "", "room.py has no Layer.backward"),
    "a module that is gone": ("{{ source package.hall.Layer }}", "", "no module has package.hall.Layer"),
    "a link out": ("See [the room](../package/room.py).", r'href="repository/package/room.py/"', ""),
    "a link to nothing": ("See [the hall](../package/hall.py).", "", "links to package/hall.py, which is not there"),
    "a page that is named": ("See `docs/more.md`.", r'<a href="more/">docs/more.md</a>', ""),
    "a page that is gone": ("See `docs/less.md`.", "", "names docs/less.md, which is not there"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_gone_fails_the_build(tmp_path: Path, case: str) -> None:
    text, expected, problem = CASES[case]
    (tmp_path / "docs").mkdir()
    (tmp_path / "package").mkdir()
    shutil.copy(ROOT / "scripts/site_hooks.py", tmp_path)
    source = 'TOP = 8\n\n\nclass Layer:\n    def forward(self):\n        """Docstring."""\n        return 1\n'
    (tmp_path / "package/room.py").write_text(source)
    settings = {"site_name": "s", "hooks": ["site_hooks.py"], "not_in_nav": "/repository/", "theme": "material"}
    settings["markdown_extensions"] = ["pymdownx.highlight", "pymdownx.superfences"]
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    (tmp_path / "docs/index.md").write_text(PAGE.format(text))
    (tmp_path / "docs/more.md").write_text("# More\n")
    result = build(tmp_path, tmp_path / "site")
    assert (result.returncode == 0) == (not problem), result.stderr
    if problem:
        assert f"docs/index.md: {text if 'source' in text else ''}" in result.stderr
        assert problem in result.stderr
    else:
        html = (tmp_path / "site/index.html").read_text()
        assert re.search(expected, html)
        assert "Docstring" not in html


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    handler = lambda *arguments: Quiet(*arguments, directory=str(site))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


FOUND = """new Promise(resolve => {
    document.querySelector("#__search").checked = true
    const query = document.querySelector("[data-md-component=search-query]")
    query.focus()
    query.value = "dispatcher"
    query.dispatchEvent(new Event("keyup", {bubbles: true}))
    const look = () => {
        const found = document.querySelectorAll(".md-search-result__item").length
        found ? resolve(found) : setTimeout(look, 50)
    }
    look()
})"""


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("page", ["", "plan/", "reference/routing/", "internals/layers/"])
def test_pages_say_nothing_in_the_console(browser: Browser, address: str, page: str, dark: bool) -> None:
    opened = browser.open(address + page, dark=dark)
    scheme = opened.evaluate("document.body.dataset.mdColorScheme")
    assert scheme == ("slate" if dark else "default")
    if not page:
        assert opened.evaluate(FOUND) > 0
    assert opened.complaints() == []
    assert all(request.startswith((address, "data:", "blob:")) for request in opened.requests())
    opened.close()
