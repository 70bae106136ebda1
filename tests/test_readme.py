"""The README's example runs as it stands, and its commands exist."""

import re
from pathlib import Path

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


def test_what_it_links_to_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_two_commands_are_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("quickstart", "test"):
        assert f"make {target}" in README and f"\n{target}:" in makefile
