import math

import pytest
import torch

from metamask_plugin.losses.distance_polarization import distance_polarization


def loop_oracle(views, delta_plus, delta_minus):
    z, terms = torch.cat(views), []
    for i in range(len(z)):
        for j in range(len(z)):
            if i != j:
                distance = (1 - float(z[i] @ z[j] / (z[i].norm() * z[j].norm()))) / 2
                terms.append(abs(min((distance - delta_plus) * (distance - delta_minus), 0)))
    return sum(terms) / len(terms)


def at_distance(distance):
    """Two unit vectors that far apart, the second with a gradient."""
    angle = math.acos(1 - 2 * distance)
    return torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], requires_grad=True)


@pytest.fixture
def views(double):
    torch.manual_seed(0)
    return [torch.randn(5, 4) for _ in range(3)]


@pytest.mark.parametrize("margin", [(0.2, 0.5), (0.0, 1.0), (0.4, 0.6)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_against_loops(views, count, margin):
    ours = distance_polarization(views[:count], *margin)
    assert ours.item() == pytest.approx(loop_oracle(views[:count], *margin), rel=1e-12)


def test_neither_order_nor_length_counts(views):
    value = distance_polarization(views)
    shuffled = [view[torch.randperm(5)] for view in reversed(views)]
    torch.testing.assert_close(distance_polarization(shuffled), value)
    torch.testing.assert_close(distance_polarization([view * 7 for view in views]), value)


@pytest.mark.parametrize(
    ("distance", "pushed"), [(0.1, 0), (0.25, -1), (0.45, 1), (0.6, 0)], ids=["near", "lower", "upper", "far"]
)
def test_a_step_down_the_gradient_leaves_the_margin_by_the_nearer_edge(double, distance, pushed):
    z = at_distance(distance)
    distance_polarization([z]).backward()
    stepped = (z - 0.1 * z.grad).detach()
    moved = (1 - torch.cosine_similarity(*stepped, dim=0)) / 2 - distance
    assert torch.sign(moved.round(decimals=9)) == pushed


def test_bounds(double):
    assert distance_polarization([at_distance(0.35)]).item() == pytest.approx(0.3**2 / 4)  # mid-margin
    assert distance_polarization([torch.ones(4, 3), torch.ones(4, 3)]) == 0  # all alike: near


def test_one_image_in_two_views_is_one_pair(double):
    z = at_distance(0.35).detach()
    torch.testing.assert_close(distance_polarization([z[:1], z[1:]]), distance_polarization([z]))


def test_second_derivative(views):
    inputs = [view[:3].clone().requires_grad_() for view in views[:2]]
    assert torch.autograd.gradcheck(lambda a, b: distance_polarization([a, b]), inputs)
    assert torch.autograd.gradgradcheck(lambda a, b: distance_polarization([a, b]), inputs)
    gradients = torch.autograd.grad(distance_polarization(inputs), inputs, create_graph=True)
    (second,) = torch.autograd.grad((gradients[0] * inputs[0]).sum(), inputs[1])
    assert second.abs().sum() > 0


@pytest.mark.parametrize(
    ("shapes", "margin", "message"),
    [
        ([(3, 4), (2, 4)], (0.2, 0.5), "views must be tensors of one shape"),
        ([(3, 4, 5)], (0.2, 0.5), "views must be"),
        ([(1, 4)], (0.2, 0.5), "two rows or more in all"),
        ([], (0.2, 0.5), "views must be"),
        ([(3, 4)], (0.5, 0.5), "0 <= delta_plus < delta_minus <= 1, got 0.5 and 0.5"),
        ([(3, 4)], (-0.1, 0.5), "delta_plus and delta_minus must be"),
        ([(3, 4)], (0.1, 1.1), "delta_plus and delta_minus must be"),
    ],
)
def test_wrong_input(shapes, margin, message):
    with pytest.raises(ValueError, match=message):
        distance_polarization([torch.randn(shape) for shape in shapes], *margin)
