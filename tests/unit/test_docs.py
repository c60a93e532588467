"""Pages that are generated or promised stay true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_method_table_is_up_to_date() -> None:
    result = subprocess.run([sys.executable, ROOT / "docs" / "make_methods.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_worked_example_is_a_method_that_exists() -> None:
    """docs/add-a-method.md shows a real file; its code must be that file's, word for word."""
    page = (ROOT / "docs" / "add-a-method.md").read_text()
    assert len(page.splitlines()) <= 60
    shown = re.search(r"```python\n# (src/graft/\S+)\n(.*?)```", page, re.DOTALL)
    assert shown is not None
    real = (ROOT / shown[1]).read_text()
    for block in re.split(r"\n *\.\.\.\n", shown[2]):
        assert block.strip() in real, block


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_schema_of_results_is_the_code_s() -> None:
    from graft.compare.results import FIELDS

    table = re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs" / "compare.md").read_text(), re.MULTILINE)
    assert dict(table) == FIELDS
    assert [key for key, _ in table] == list(FIELDS)
