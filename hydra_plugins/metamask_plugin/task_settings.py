"""Makes a config group ``task_settings/<section>`` of each section of ``base/task_settings.yaml``.

Hydra imports this in every application. It does not import the package, which would turn the search path on.
"""

from importlib.util import find_spec
from pathlib import Path

import yaml
from hydra.core.config_store import ConfigStore

PACKAGE = Path(find_spec("metamask_plugin").origin).parent
FILE = PACKAGE / "scripts" / "pretrain" / "base" / "task_settings.yaml"

for section, tasks in yaml.safe_load(FILE.read_text(encoding="utf-8")).items():
    for task, settings in tasks.items():
        ConfigStore.instance().store(
            group=f"task_settings/{section}",
            name=task,
            node=settings,
            package="method_kwargs",
            provider="metamask_plugin",
        )
