"""Projection heads."""

from torch import nn


def projection_head(
    input_dim: int, hidden_dim: int, output_dim: int, layers: int = 2, final_norm: bool = False
) -> nn.Sequential:
    """An MLP with BatchNorm and ReLU between its linear layers.

    Args:
        input_dim: features in.
        hidden_dim: width of the hidden layers.
        output_dim: features out.
        layers: number of linear layers; SimCLR uses 2, Barlow Twins 3.
        final_norm: BatchNorm on the output too, as the official MetaMask release has it.

    Returns:
        A module from (N, input_dim) to (N, output_dim).
    """
    widths = [input_dim, *[hidden_dim] * (layers - 1), output_dim]
    modules: list[nn.Module] = []
    for i, (width_in, width_out) in enumerate(zip(widths, widths[1:])):
        last = i == layers - 1
        normalised = not last or final_norm
        modules.append(nn.Linear(width_in, width_out, bias=not normalised))
        if normalised:
            modules.append(nn.BatchNorm1d(width_out))
        if not last:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)
