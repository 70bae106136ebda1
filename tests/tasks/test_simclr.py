import pytest
import torch

from metamask_plugin.errors import UserError
from metamask_plugin.losses import nt_xent_loss
from metamask_plugin.tasks import TASKS, Task, build_task


def test_registered_tasks_are_tasks():
    assert "simclr" in TASKS
    assert all(issubclass(task, Task) for task in TASKS.values())


def test_is_nt_xent_on_the_projections():
    torch.manual_seed(0)
    task = build_task("simclr", 6, {"proj_hidden_dim": 8, "proj_output_dim": 4, "temperature": 0.3}).eval()
    views = [torch.randn(5, 6) for _ in range(2)]
    torch.testing.assert_close(task(views).loss, nt_xent_loss([task.project(v) for v in views], 0.3))
    assert task.project(views[0]).shape == (5, 4)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("simclrr", {}, "method_kwargs.task must be one of .*; did you mean 'simclr'"),
        ("simclr", {"tau": 1}, "do not fit the task 'simclr'"),
        ("simclr", {"temperature": -1}, "temperature must be > 0"),
    ],
)
def test_wrong_input(name, kwargs, message):
    with pytest.raises(UserError, match=message):
        build_task(name, 6, kwargs)
