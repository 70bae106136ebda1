"""Aliases of a YAML file that unfold to more than a config can hold."""

import pytest
from omegaconf import OmegaConf

from metamask_plugin.cli.hydra_errors import MOST_VALUES, bounded_aliases, unfolded
from metamask_plugin.errors import UserError


def bomb(depth, width=9):
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    for level in range(1, depth):
        entries = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"a{level}: &a{level} [{entries}]")
    return "\n".join(lines)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_values_are_counted_as_omegaconf_would_copy_them(depth):
    def leaves(node):
        if isinstance(node, dict):
            return sum(1 + leaves(value) for value in node.values())
        return sum(map(leaves, node)) if isinstance(node, list) else 1

    text = bomb(depth, width=3)
    assert unfolded(text) == leaves(OmegaConf.to_container(OmegaConf.create(text)))


@pytest.mark.fault("config")
@pytest.mark.parametrize("text", [bomb(5), bomb(60), "a: &a [*a]"], ids=["9^5", "9^60", "within itself"])
def test_a_bomb_is_refused_before_it_is_unfolded(tmp_path, text):
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    with (
        bounded_aliases(),
        pytest.raises(UserError, match=rf"bomb.yaml must be of at most {MOST_VALUES} values"),
    ):
        OmegaConf.load(path.open())


def test_usual_aliases_are_read_and_the_loader_is_as_before(tmp_path):
    path, load = tmp_path / "usual.yaml", OmegaConf.load
    path.write_text("first: &crop {size: 32}\nsecond: *crop\nglob: a*b&c")
    with bounded_aliases(), path.open() as file:
        assert OmegaConf.load(file).second.size == 32
    assert OmegaConf.load is load
