"""The pages of the repository: links resolve, every folder has one, and none refers to a text that is not here."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from psyche.config import load_config

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
PAGES = [name for name in TRACKED if name.endswith(".md")]
ROOMS = sorted({str(Path(name).parent) for name in TRACKED if re.fullmatch(r"psyche/[a-z]+/__init__\.py", name)})

pytestmark = pytest.mark.skipif(not TRACKED, reason="not in a git checkout")


def anchors(page: Path) -> set[str]:
    """The anchors GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), f"{name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{name} links to {link}: there is no such heading"


@pytest.mark.parametrize("folder", [*ROOMS, ".", "psyche", "configs", "kernels", "scripts", "tests"])
def test_every_folder_has_a_page(folder: str) -> None:
    assert str(Path(folder) / "README.md") in TRACKED


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(), flags=re.M | re.S)
    for mentioned in re.findall(r"`([\w/]+\.(?:py|cpp|cu|h|sh|yaml))`", text):
        found = [one for one in TRACKED if one == mentioned or one.endswith(f"/{mentioned}")]
        assert found or mentioned in ("run.yaml",), f"{name} names {mentioned}"


def test_the_configuration_of_the_first_page_is_valid(tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert block is not None
    (tmp_path / "run.yaml").write_text(block[1])
    assert load_config(tmp_path / "run.yaml").run.name == "my-first-run"


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


def test_nothing_refers_to_a_text_that_is_not_here() -> None:
    ours = [name for name in TRACKED if name.endswith((".py", ".md", ".yaml", ".toml", ".sh", ".cpp", ".cu", ".h"))]
    found = [name for name in ours if re.search(r"\bDESIGN\b", (ROOT / name).read_text())]
    assert [name for name in found if name != "tests/test_pages.py"] == []
