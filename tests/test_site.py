"""The site builds without a warning, its links lead somewhere, and nothing on it needs a network."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.packages import needs_chromium
from tools import site
from tools.browser import find_chromium, headless_page
from tools.environment import locked_requirements, requirements_of
from tools.lock import canonical

ROOT = Path(__file__).parents[1]


def build(output: Path, checkout: Path = ROOT) -> subprocess.CompletedProcess[str]:
    try:
        return site.build(output, checkout=checkout)
    except subprocess.CalledProcessError:  # of pip
        pytest.skip("mkdocs cannot be installed here: pip install -e '.[docs]'")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("site")
    done = build(output)
    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout
    return output


def test_every_page_is_built_and_asks_no_other_host(built: Path) -> None:
    pages = {path.name for path in built.glob("*.html")} - {"404.html"}
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} <= pages
    assert {"index.html", "zoo.html", "recipes.html", "changelog.html"} <= pages
    for name in pages:
        text = (built / name).read_text()
        assert re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*", text) == [], name
        for target in re.findall(r'(?:src|href)="?([^"#?\s>]+)', text):
            if not re.match(r"[a-z]+:", target):
                assert (built / target).exists(), f"{name}: {target}"


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    page = tmp_path / "docs/concepts.md"
    page.write_text(page.read_text() + "\n[a](nowhere.md) [b](../pipeline/nowhere.py) [c](methods.md#nowhere)\n")
    done = build(tmp_path / "site", checkout=tmp_path)
    assert done.returncode != 0
    warnings = [line for line in done.stdout.splitlines() if "WARNING" in line]
    assert [re.findall(r"'(\S*nowhere\S*)'", line)[0] for line in warnings] == [
        *("nowhere.md", "../pipeline/nowhere.py", "methods.md#nowhere"),
    ], done.stdout


@needs_chromium
def test_search_works_from_disk(built: Path) -> None:
    program = find_chromium()
    assert program is not None
    with headless_page(program) as page:
        page.open((built / "index.html").as_uri() + "?q=in-time+over-parameterisation")
        page.wait_for("matching documents", "Concepts")


def test_the_lock_of_the_site_fits_pyproject() -> None:
    locked = dict(line.split("==") for line in locked_requirements(site.LOCK))
    wanted = requirements_of("docs")[len(requirements_of()) :]
    assert {canonical(re.split(r"[<>=]", line)[0]) for line in wanted} <= set(locked)
