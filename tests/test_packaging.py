"""What an installed package has: every module, Hydra's plugin, and every config."""

import configparser
from glob import glob
from pathlib import Path

import pytest

import metamask_plugin

ROOT = Path(__file__).resolve().parents[1]


def test_the_plugin_and_every_module_are_installed():
    setuptools = pytest.importorskip("setuptools", reason="no setuptools")
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    include = setup["options.packages.find"]["include"].split()
    found = set(setuptools.find_namespace_packages(str(ROOT), include=include))
    sources = [*ROOT.glob("metamask_plugin/**/*.py"), *ROOT.glob("hydra_plugins/**/*.py")]
    assert {".".join(path.parent.relative_to(ROOT).parts) for path in sources} <= found


def test_every_config_and_template_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    installed = {
        Path(path).resolve()
        for pattern in setup["options.package_data"]["metamask_plugin"].split()
        for path in glob(str(ROOT / "metamask_plugin" / pattern), recursive=True)
    }
    configs = set((ROOT / "scripts").rglob("*.yaml"))
    templates = set((ROOT / "metamask_plugin").rglob("*.html"))
    typed = {ROOT / "metamask_plugin" / "py.typed"}
    assert installed == {path.resolve() for path in configs | templates | typed} and configs and templates
    assert (ROOT / "scripts").resolve() == metamask_plugin.SCRIPTS.resolve()
