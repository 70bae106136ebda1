"""Studies without Hydra's application around them: the jobs run here, one after the other."""

import pytest
from composing import composed

from metamask_plugin.cli.study import run_trial, sweep


class Studies:
    """Runs studies in one folder, so that they share their pretraining runs."""

    def __init__(self, folder):
        self.folder = folder
        self.launched = []

    def compose(self, name, *overrides):
        folders = [f"dir={self.folder / 'studies'}", f"runs_dir={self.folder / 'runs'}"]
        return composed("study", name, *folders, "size=smoke", "seeds=[5]", *overrides)

    def sweep(self, name, *overrides):
        """Runs a study; the jobs it launched are in ``launched``. Returns the report's path."""
        self.launched = []

        def launch(jobs, first):
            returned = []
            for job in jobs:
                self.launched.append(job)
                returned.append(self.job(name, *overrides, *job))
            return returned

        return sweep(self.compose(name, *overrides), launch)

    def job(self, name, *overrides):
        run_trial(self.compose(name, *overrides))
        return Returned()


class Returned:
    """What Hydra's launcher gives back for a job that ended well."""

    return_value = None


@pytest.fixture(scope="session")
def studies(tmp_path_factory):
    return Studies(tmp_path_factory.mktemp("studies"))


@pytest.fixture
def fresh_studies(tmp_path):
    return Studies(tmp_path)
