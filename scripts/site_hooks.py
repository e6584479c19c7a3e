"""What mkdocs.yml asks for beside its plugins: snippets out of the source, and links to what is outside docs/.

`{{ source crossdock.moe.MoE.forward }}`, alone on a line, is replaced by that function, class or constant as it stands
in the source; `{{ source NAME without docstring }}` leaves out its docstring. A name that is not there fails the build.

A link to a file outside docs/ (`[...](../SECURITY.md)`), which works where the files are looked at in a repository,
works on the site as well: it goes to `repo_url` where mkdocs.yml has one, else to a page of the site with that file. A
page that is named as code (docs/plan.md within backquotes) becomes a link. What is not there fails the build.
"""

from __future__ import annotations

import ast
import posixpath
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

__all__ = ["on_files", "on_page_markdown", "source_of"]

_DOCS = "docs/"
_OUTSIDE = "repository/"  # of the site: pages with files that are not in docs/
_FENCED = re.compile(r"^(```+).*?^\1[ ]*$", re.MULTILINE | re.DOTALL)
_SOURCE = re.compile(r"^\{\{ source (?P<name>[\w.]+)(?P<bare> without docstring)? \}\}$", re.MULTILINE)
_LINK = re.compile(r"\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")
_NAMED_PAGE = re.compile(r"(?<!\[)`docs/(?P<page>[\w/]+\.md)`")
_LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash", ".sbatch": "bash"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each file outside docs/ that a page links to, and for each that such a page links to."""
    if config.repo_url:
        return files
    root = _root(config)
    waiting = [_DOCS + file.src_uri for file in files.documentation_pages()]
    while waiting:
        path = waiting.pop()
        for target in _targets(path, (root / path).read_text()):
            if target.startswith(_DOCS) or files.get_file_from_path(_src_uri(target)) is not None:
                continue
            files.append(File.generated(config, _src_uri(target), content=_content(root, target, path)))
            if target.endswith(".md"):
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its snippets and links."""
    here = _repository_path(page.file.src_uri)
    if not here.endswith(".md"):
        return markdown
    root = _root(config)

    def link(match: re.Match[str]) -> str:
        target, anchor = _resolved(here, match["target"]), match["anchor"] or ""
        if not target.startswith(_DOCS) and config.repo_url:
            if not (root / target).exists():
                raise PluginError(f"{here}: links to {match['target']}, which is not there")
            return f"]({config.repo_url.rstrip('/')}/blob/main/{target}{anchor})"
        return f"]({_relative(page, _src_uri(target))}{anchor})"

    def named_page(match: re.Match[str]) -> str:
        target = match["page"]
        if target == page.file.src_uri:
            return match[0]
        if files.get_file_from_path(target) is None:
            raise PluginError(f"{here}: names docs/{target}, which is not there")
        return f"[docs/{target}]({_relative(page, target)})"

    markdown = _outside_code(markdown, lambda text: _NAMED_PAGE.sub(named_page, _LINK.sub(link, text)))
    return _SOURCE.sub(lambda match: _snippet(root, here, match), markdown)


def source_of(root: Path, name: str, *, with_docstring: bool = True) -> tuple[str, str]:
    """The path, within `root`, and the text of what `name` (`crossdock.moe.MoE.forward`) is in the source.

    Raises:
        LookupError: where there is no such module, or nothing of that name in it.
    """
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        stem = root.joinpath(*parts[:length])
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                text = path.read_text()
                found = _lines_of(ast.parse(text), parts[length:], with_docstring)
                if found is None:
                    raise LookupError(f"{path.relative_to(root)} has no {'.'.join(parts[length:])}")
                lines = text.splitlines()
                kept = "\n".join(lines[number - 1] for number in found)
                return path.relative_to(root).as_posix(), textwrap.dedent(kept)
    raise LookupError(f"no module has {name}")


def _lines_of(tree: ast.Module, names: list[str], with_docstring: bool) -> list[int] | None:
    node: ast.AST = tree
    for name in names:
        inside = [child for child in getattr(node, "body", []) if name in _names_of(child)]
        if not inside:
            return None
        node = inside[-1]  # after its overloads
    assert isinstance(node, ast.stmt)
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
    lines = list(range(first, (node.end_lineno or first) + 1))
    if not with_docstring and isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
        docstring = node.body[0]
        left_out = range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1)
        lines = [line for line in lines if line not in left_out]
    return lines


def _names_of(node: ast.AST) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _snippet(root: Path, here: str, match: re.Match[str]) -> str:
    try:
        path, text = source_of(root, match["name"], with_docstring=not match["bare"])
    except LookupError as error:
        raise PluginError(f"{here}: {match[0]}: {error}") from None
    return f'````python title="{path}"\n{text}\n````'


def _root(config: MkDocsConfig) -> Path:
    return Path(config.docs_dir).parent


def _src_uri(path: str) -> str:
    """Where on the site a file of the repository is."""
    if path.startswith(_DOCS):
        return path.removeprefix(_DOCS)
    return _OUTSIDE + (path if path.endswith(".md") else f"{path}.md")


def _repository_path(src_uri: str) -> str:
    """The file of the repository that a page of the site is."""
    if not src_uri.startswith(_OUTSIDE):
        return _DOCS + src_uri
    path = src_uri.removeprefix(_OUTSIDE)
    return path.removesuffix(".md") if Path(path.removesuffix(".md")).suffix else path


def _resolved(here: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(here), target))


def _relative(page: Page, src_uri: str) -> str:
    return posixpath.relpath(src_uri, posixpath.dirname(page.file.src_uri) or ".")


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    pieces, end = [], 0
    for match in _FENCED.finditer(markdown):
        pieces += [change(markdown[end : match.start()]), match[0]]
        end = match.end()
    return "".join([*pieces, change(markdown[end:])])


def _targets(path: str, markdown: str) -> list[str]:
    found: list[str] = []

    def note(text: str) -> str:
        found.extend(_resolved(path, match["target"]) for match in _LINK.finditer(text))
        return text

    _outside_code(markdown, note)
    return found


def _content(root: Path, path: str, linked_from: str) -> str:
    file = root / path
    if path.startswith("..") or not file.exists():
        raise PluginError(f"{linked_from}: links to {path}, which is not there")
    if file.is_dir():
        names = sorted(each.name for each in file.iterdir() if not each.name.startswith((".", "__")))
        return f"# {path}\n\n" + "".join(f"- `{name}`\n" for name in names)
    text = file.read_text()
    if path.endswith(".md"):
        return text
    return f"# {path}\n\n`````{_LANGUAGES.get(file.suffix, 'text')}\n{text}\n`````\n"
