"""The README's example runs as it stands, and its commands exist."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_engines_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    torch.manual_seed(0)
    names = {
        "my_encoder": nn.Sequential(nn.Linear(5, 4), nn.Tanh()),
        "my_head": nn.Linear(4, 3),
        "my_loss": lambda z: z.pow(2).mean(),
        "x": torch.randn(6, 5),
        "mask": torch.ones(4),
    }
    exec(code, names)
    assert names["gradient"].shape == (4,) and names["gradient"].abs().sum() > 0


def anchors(page):
    """GitHub's names for a page's headings; a repeated one gets a number."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return found


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_what_the_pages_link_to_exists(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    assert links or page.name in ("configuration.md", "solo_learn.md")
    for link in links:
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path) if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_two_commands_are_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("quickstart", "test"):
        assert f"make {target}" in README and f"\n{target}:" in makefile
