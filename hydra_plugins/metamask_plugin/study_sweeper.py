"""Hands a study's trials to Hydra's launcher: one after the other, joblib's processes, SLURM's jobs."""

from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

ConfigStore.instance().store(
    group="hydra/sweeper",
    name="study",
    node={"_target_": "hydra_plugins.metamask_plugin.study_sweeper.StudySweeper"},
    provider="metamask_plugin",
)


class StudySweeper(Sweeper):
    """The job ``trial=<number>`` for each trial of the study that is not finished yet, then the report."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Runs what is missing; ``arguments`` is what the user changed in the study's config."""
        from metamask_plugin.cli.study import sweep

        def launch(jobs: list[list[str]], first: int) -> list[Any]:
            return self.launcher.launch([[*arguments, *overrides] for overrides in jobs], first)

        return sweep(self.config, launch)
