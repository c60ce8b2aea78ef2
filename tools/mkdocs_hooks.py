"""Pages of the site that are files of the repository's root, with links that hold in both places."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "add_a_method.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links between the root and `docs/`; what the site does not hold becomes plain text."""
    folder = ROOT if page.file.generated_by else (ROOT / "docs" / page.file.src_uri).parent

    def rewrite(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = (folder / target).resolve()
        held = PAGES.get(path.name) if path.parent == ROOT else None
        if held is None and path.is_relative_to(ROOT / "docs"):
            held = path.relative_to(ROOT / "docs").as_posix()
        if held is None or files.get_file_from_path(held) is None:
            return text
        up = "../" * page.file.src_uri.count("/")
        return f"[{text}]({up}{held}{anchor or ''})"

    return re.sub(r"\[([^\]]+)\]\(([^)#:]+)(#[^)]*)?\)", rewrite, markdown)
