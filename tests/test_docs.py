"""Every Python block in the README and the docs runs; the blocks of one file share their names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@pytest.fixture
def examples_unregistered():
    """Take the layers that a page registers as examples out again."""
    from nestor.layers import registry

    yield
    for name in registry._mixers.keys() - registry.MIXER_MODULES.keys():
        del registry._mixers[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run(page: Path, tmp_path, monkeypatch, examples_unregistered):
    text = page.read_text(encoding="utf-8")
    assert text.count("```python") == len(BLOCK.findall(text))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for match in BLOCK.finditer(text):
        # Blank lines in front make a traceback show the line of the page.
        line = text.count("\n", 0, match.start(1))
        exec(compile("\n" * line + match[1], str(page), "exec"), names)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_to_files_of_the_repository_lead_somewhere(page: Path):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
