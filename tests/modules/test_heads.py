import pytest
import torch
from torch import nn

from metamask_plugin.modules.heads import projection_head


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("final_norm", [False, True])
def test_layers_and_norms(layers, final_norm):
    head = projection_head(6, 8, 4, layers, final_norm)
    kinds = [type(module) for module in head]
    assert kinds.count(nn.Linear) == layers
    assert kinds.count(nn.ReLU) == layers - 1
    assert kinds.count(nn.BatchNorm1d) == layers - 1 + final_norm
    assert head(torch.randn(3, 6)).shape == (3, 4)


def test_final_norm_standardises_the_output():
    z = projection_head(6, 8, 4, final_norm=True)(torch.randn(64, 6))
    torch.testing.assert_close(z.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
