"""The meta-gradient as a strategy: five estimators, and the first-order pass that they share."""

import random
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import NamedTuple, cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm

from metamask_plugin.bilevel.inner_step import InnerStep
from metamask_plugin.bilevel.problem import BilevelProblem, EncoderPass, OuterParams, Params, leaves
from metamask_plugin.bilevel.tape import Tape


class MetaGradient(NamedTuple):
    """A meta-gradient and what was computed on the way; all but the first are detached scalars.

    Attributes:
        outer_params: dL_out/dw, shaped as the problem's ``outer_params``.
        inner_loss: L_in at the parameters.
        outer_loss: L_out at the adapted parameters.
        gain: L_out at the parameters less L_out at the adapted ones. An inner step that is right for its
            purpose has one above 0; where both losses are the same it is L_in - L_out.
        relative_length: of the inner step, |(theta', phi') - (theta, phi)| / |(theta, phi)|.
    """

    outer_params: OuterParams
    inner_loss: torch.Tensor
    outer_loss: torch.Tensor
    gain: torch.Tensor
    relative_length: torch.Tensor


class Estimator(ABC):
    """How dL_out/dw is computed.

    With v the gradient of L_out at the adapted parameters and l the inner step's length,

        dL_out/dw = d_w L_out  -  d_w < grad L_in(theta, phi, w), l * v >

    The first term is direct; the second holds the second derivatives, and here estimators differ.
    """

    @abstractmethod
    def gradient(self, problem: BilevelProblem, step: InnerStep) -> MetaGradient:
        """Computes the meta-gradient; parameters, their ``.grad``, buffers and RNG stay untouched.

        Args:
            problem: one batch's problem.
            step: how theta' and phi' are made.
        """


class Exact(Estimator):
    """dL_out/dw to rounding error, without a second derivative through the encoder.

    The correction is d_w of

        s(w) = < grad_theta L_in, u_theta > + < grad_phi L_in, u_phi >,     u = l * v

    and w enters behind the encoder. With h = f_theta(x), the first product is a directional
    derivative of the encoder alone: < grad_theta L_in, u > = < grad_h L_in, J_theta f . u >. So one
    forward-mode pass gives the tangent of h, and what is left to differentiate twice is the heads.
    For the general case, see mixed-mode differentiation [0].

    Cost, in encoder forwards F (a backward counts 2F): inner 3F, outer 3F, forward mode 2F, since the inner
    pass has computed its primal part already (3F with ``reuse=False``). Where the regular step's pass serves
    as the inner one (``BilevelProblem.encoded``), the inner part is 2F.

    Reverse mode over *forward* mode would be as cheap, but is silently wrong through a train-mode
    BatchNorm in the heads (pytorch#196699). Reverse mode over reverse mode, used here at the heads,
    is not.

    Args:
        reuse: keep the outputs of the inner pass's convolutions and linear layers for the forward-mode
            pass: a quarter less arithmetic there, for memory that is held a little longer.

    [0] Kemaev et al., *Scalable Meta-Learning via Mixed-Mode Differentiation*, ICML 2025.

    Example:
        >>> from metamask_plugin.bilevel import BilevelProblem, Functional, InnerStep, PlainStep
        >>> encoder, head, w = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1), torch.ones(2)
        >>> f, g, x = Functional(encoder), Functional(head), torch.ones(4, 3)
        >>> def loss(h, phi, w):
        ...     return g(phi, h * w[0]).pow(2).mean()
        >>> problem = BilevelProblem(lambda p: f(p, x), loss, loss, f.params, g.params, (w,))
        >>> found = Exact().gradient(problem, InnerStep(PlainStep(0.1), PlainStep(0.1)))
        >>> found.outer_params[0].shape
        torch.Size([2])
    """

    def __init__(self, reuse: bool = True):
        self.reuse = reuse

    def gradient(self, problem: BilevelProblem, step: InnerStep) -> MetaGradient:
        # L_in and its gradients, at the heads with a graph; L_out at the adapted parameters, d_w L_out and u
        first = first_order_pass(problem, step, twice=True, record=self.reuse)

        # s(w): the heads' part, and the encoder's by the tangent J_theta f . u of the features
        terms = [(first.head_gradient[name] * u).sum() for name, u in first.head_direction.items()]
        s = cast(torch.Tensor, sum(terms))
        if problem.encoder_params:
            replaying = nullcontext() if first.tape is None or not self.reuse else first.tape.replaying()
            # fused attention has no forward mode
            with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), replaying:
                duals = {
                    name: forward_ad.make_dual(param, first.encoder_direction[name])
                    for name, param in problem.encoder_params.items()
                }
                features, tangent = forward_ad.unpack_dual(problem.encode(duals))
            tangent = problem.global_features(torch.zeros_like(features) if tangent is None else tangent)
            s = s + (first.features_gradient * tangent).sum()

        correction = torch.autograd.grad(s, first.outer_leaves, materialize_grads=True)
        total = tuple(direct - c for direct, c in zip(first.found.outer_params, correction))
        return first.found._replace(outer_params=total)


class FirstOrder(Estimator):
    """The direct term alone, d_w L_out at the adapted parameters.

    Cheap and wrong: it ignores how w shaped the inner step. Kept as the ablation.

    Example:
        >>> from metamask_plugin.bilevel import PlainStep
        >>> loss = lambda h, phi, w: (h * w[0]).pow(2).sum() / 2
        >>> one = torch.ones(1)  # theta = w = 1, theta' = 1/2
        >>> problem = BilevelProblem(lambda p: p["a"], loss, loss, {"a": one}, {}, (one,))
        >>> step = InnerStep(PlainStep(0.5), PlainStep(0.5))
        >>> FirstOrder().gradient(problem, step).outer_params[0]  # exact: -0.25
        tensor([0.2500])
    """

    def gradient(self, problem: BilevelProblem, step: InnerStep) -> MetaGradient:
        return first_order_pass(problem, step).found


class FiniteDifference(Estimator):
    """Second derivatives from two more first-order gradients [0], as MetaMask's release [1] computes them.

        d_w < grad L_in, u >  =  (d_w L_in(theta + e u) - d_w L_in(theta - e u)) / 2e,    e = r / |u|

    Args:
        r: length of the displacement in parameter space, > 0. The release uses 1e-2, which is far off
            for networks with BatchNorm: see ``benchmarks/step_cost.py`` for the error at each r.

    [0] Liu et al., *DARTS*, ICLR 2019, Eq. (8).
    [1] https://github.com/lionellee9089/MetaMask

    Example:
        >>> from metamask_plugin.bilevel import PlainStep
        >>> loss = lambda h, phi, w: (h * w[0]).pow(2).sum() / 2
        >>> one = torch.ones(1)  # theta = w = 1, theta' = 1/2
        >>> problem = BilevelProblem(lambda p: p["a"], loss, loss, {"a": one}, {}, (one,))
        >>> step = InnerStep(PlainStep(0.5), PlainStep(0.5))
        >>> FiniteDifference().gradient(problem, step).outer_params[0].round(decimals=3)
        tensor([-0.2500])
    """

    def __init__(self, r: float = 1e-2):
        if not r > 0:
            raise ValueError(f"FiniteDifference: r must be > 0, got {r}")
        self.r = r

    def gradient(self, problem: BilevelProblem, step: InnerStep) -> MetaGradient:
        first = first_order_pass(problem, step)
        directions = [*first.encoder_direction.values(), *first.head_direction.values()]
        norm = torch.sqrt(cast(torch.Tensor, sum(u.pow(2).sum() for u in directions)))
        # of an inner step of length 0, or a flat outer loss, any e gives the correction 0
        e = torch.where(norm > 0, self.r / norm, 1.0)
        plus, minus = (self._displaced(problem, first, sign) for sign in (e, -e))
        total = tuple(d - (p - m) / (2 * e) for d, p, m in zip(first.found.outer_params, plus, minus))
        return first.found._replace(outer_params=total)

    @staticmethod
    def _displaced(problem: BilevelProblem, first: "FirstOrderPass", e: torch.Tensor) -> OuterParams:
        """d_w L_in with both groups displaced by e * u."""
        theta = {name: p + e * first.encoder_direction[name] for name, p in problem.encoder_params.items()}
        phi = {name: p + e * first.head_direction[name] for name, p in problem.head_params.items()}
        w = tuple(w.detach().requires_grad_() for w in problem.outer_params)
        with torch.no_grad():  # w enters behind the encoder: no graph is needed through it
            h = problem.global_features(problem.first_order_encode(theta))
        return gradients(problem.inner_loss(h, phi, w), w)[0]


class Unrolled(Estimator):
    """Keeps the graph of the inner step and back-propagates through all of it: the oracle.

    Exact by construction, and the reference against which the others are tested. It is the slowest and holds
    two graphs through the encoder at once. For one process alone: what ranks exchange is not differentiated.

    Example:
        >>> from metamask_plugin.bilevel import PlainStep
        >>> loss = lambda h, phi, w: (h * w[0]).pow(2).sum() / 2
        >>> one = torch.ones(1)  # theta = w = 1, theta' = 1/2
        >>> problem = BilevelProblem(lambda p: p["a"], loss, loss, {"a": one}, {}, (one,))
        >>> step = InnerStep(PlainStep(0.5), PlainStep(0.5))
        >>> Unrolled().gradient(problem, step).outer_params[0]
        tensor([-0.2500])
    """

    def gradient(self, problem: BilevelProblem, step: InnerStep) -> MetaGradient:
        if problem.ranks is not None:
            raise ValueError("Unrolled: works in one process alone; take Exact, which equals it")
        theta, phi = leaves(problem.encoder_params), leaves(problem.head_params)
        w = tuple(w.detach().requires_grad_() for w in problem.outer_params)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no double backward
            h = problem.encode(theta)
            inner = problem.inner_loss(h, phi, w)
            grads = gradients(inner, theta, phi, create_graph=True)
            theta_grad, phi_grad = ({name: grad.detach() for name, grad in group.items()} for group in grads)
            linear = step.at((problem.encoder_params, problem.head_params), (theta_grad, phi_grad))
            adapted_theta = linear.encoder.step(theta, grads[0])
            adapted_phi = linear.head.step(phi, grads[1])
            encode = problem.outer_encode or problem.encode
            outer = problem.outer_loss(encode(adapted_theta), adapted_phi, w)
            (total,) = gradients(outer, w)
        before = outer_loss_before(problem, h.detach(), inner)
        with torch.no_grad():
            length = relative_length(problem, adapted_theta, adapted_phi)
        return MetaGradient(total, inner.detach(), outer.detach(), before - outer.detach(), length)


class Permuted(Estimator):
    """A control: the exact meta-gradient with its entries permuted along the last axis, always alike.

    Outer parameters that follow it take steps as long, as persistent and as spread as they would otherwise,
    in a direction that has nothing to do with their dimensions. What they gain over fixed ones is not due to
    the meta-gradient.

    Args:
        seed: of the permutation.

    Example:
        >>> from metamask_plugin.bilevel import PlainStep
        >>> loss = lambda h, phi, w: (h * w[0]).pow(2).sum() / 2
        >>> theta, w = {"a": torch.arange(1.0, 4.0)}, torch.ones(3)
        >>> problem = BilevelProblem(lambda p: p["a"], loss, loss, theta, {}, (w,))
        >>> found = Permuted().gradient(problem, InnerStep(PlainStep(0.5), PlainStep(0.5)))
        >>> found.outer_params[0].sort().values  # exact: -0.25, -1, -2.25
        tensor([-2.2500, -1.0000, -0.2500])
    """

    def __init__(self, seed: int = 0):
        if not isinstance(seed, int):
            raise ValueError(f"Permuted: seed must be a whole number, got {seed!r}")
        self.seed, self.exact = seed, Exact()
        self._orders: dict[int, torch.Tensor] = {}

    def gradient(self, problem: BilevelProblem, step: InnerStep) -> MetaGradient:
        result = self.exact.gradient(problem, step)
        return result._replace(outer_params=tuple(self._permuted(grad) for grad in result.outer_params))

    def _permuted(self, gradient: torch.Tensor) -> torch.Tensor:
        size = gradient.shape[-1]
        if size not in self._orders:  # made once: a CUDA graph can hold no copy from the host
            order = random.Random(self.seed).sample(range(size), size)
            self._orders[size] = torch.tensor(order, device=gradient.device)
        return gradient[..., self._orders[size]]


class HeadsOnly(Estimator):
    """Another estimator on a problem whose encoder takes no inner step: theta' = theta.

    Args:
        estimator: the other one.

    Example:
        >>> from metamask_plugin.bilevel import PlainStep
        >>> loss = lambda h, phi, w: (h * phi["b"] * w[0]).pow(2).sum() / 2
        >>> one = torch.ones(1)  # theta' = theta = phi = w = 1, phi' = 1/2
        >>> problem = BilevelProblem(lambda p: p["a"], loss, loss, {"a": one}, {"b": one}, (one,))
        >>> step = InnerStep(PlainStep(0.5), PlainStep(0.5))
        >>> HeadsOnly(Exact()).gradient(problem, step).outer_params[0]
        tensor([-0.2500])
    """

    def __init__(self, estimator: Estimator):
        self.estimator = estimator

    def gradient(self, problem: BilevelProblem, step: InnerStep) -> MetaGradient:
        return self.estimator.gradient(problem.frozen_encoder(), step)


ESTIMATORS: dict[str, type[Estimator]] = {
    "exact": Exact,
    "unrolled": Unrolled,
    "finite_difference": FiniteDifference,
    "first_order": FirstOrder,
    "permuted": Permuted,
}


class FirstOrderPass(NamedTuple):
    """What takes first derivatives alone: L_in, the inner step, L_out at the adapted parameters.

    Attributes:
        outer_leaves: w, as leaves of L_in's graph.
        features_gradient: grad_h L_in of the global batch.
        head_gradient: grad_phi L_in.
        tape: of the encoder's pass at theta, if one was recorded.
        found: the direct term d_w L_out at the adapted parameters, and what a meta-gradient tells besides.
        encoder_direction: u_theta = l * v, the direction in which L_in's gradient is differentiated.
        head_direction: u_phi alike.
    """

    outer_leaves: OuterParams
    features_gradient: torch.Tensor
    head_gradient: Params
    tape: Tape | None
    found: MetaGradient
    encoder_direction: Params
    head_direction: Params


def first_order_pass(
    problem: BilevelProblem, step: InnerStep, twice: bool = False, record: bool = False
) -> FirstOrderPass:
    """Takes the inner step and back-propagates L_out behind it.

    Args:
        problem: the problem.
        step: the inner step.
        twice: keep the graph of L_in's gradients behind the encoder, so that they can be differentiated once
            more.
        record: record the pass through the encoder on a tape.
    """
    # L_in and its gradients at (theta, phi, w)
    encoded = problem.encoded
    if encoded is None:
        theta = {name: param.detach().requires_grad_() for name, param in problem.encoder_params.items()}
        tape = Tape() if record else None
        if tape is None:
            encoded = EncoderPass(problem.first_order_encode(theta), theta)
        else:
            with problem.eager(), tape.recording():
                encoded = EncoderPass(problem.first_order_encode(theta), theta, tape)
    h, phi, w = problem.loss_inputs(encoded.features, problem.head_params)
    inner = problem.inner_loss(h, phi, w)
    (grad_h,), grad_phi = gradients(inner, (h,), phi, create_graph=twice)
    grad_theta = encoder_gradient(problem, encoded, grad_h)
    inner_loss, grad_phi_now = inner.detach(), {name: grad.detach() for name, grad in grad_phi.items()}
    loss_before = outer_loss_before(problem, h, inner_loss)

    # the inner step: (theta', phi'), in no graph
    linear = step.at((problem.encoder_params, problem.head_params), (grad_theta, grad_phi_now))
    adapted_theta = linear.encoder.step(problem.encoder_params, grad_theta)
    adapted_phi = linear.head.step(problem.head_params, grad_phi_now)

    # L_out at (theta', phi', w): d_w L_out, and u = l * v of both groups
    theta = {name: param.detach().requires_grad_() for name, param in adapted_theta.items()}
    outer_encoded = EncoderPass((problem.outer_encode or problem.first_order_encode)(theta), theta)
    h, phi, outer_w = problem.loss_inputs(outer_encoded.features, adapted_phi)
    outer = problem.outer_loss(h, phi, outer_w)
    (v_h,), v_phi, direct = gradients(outer, (h,), phi, outer_w)
    v_theta = encoder_gradient(problem, outer_encoded, v_h)
    length = relative_length(problem, adapted_theta, adapted_phi)
    found = MetaGradient(direct, inner_loss, outer.detach(), loss_before - outer.detach(), length)
    directions = linear.encoder.vjp(v_theta), linear.head.vjp(v_phi)
    return FirstOrderPass(w, grad_h, grad_phi, encoded.tape, found, *directions)


def gradients(loss: torch.Tensor, *groups: Params | OuterParams, create_graph: bool = False) -> list:
    """Gradients of ``loss`` with respect to each group, in the group's own shape (zeros if unused)."""
    tensors = [t for group in groups for t in (group.values() if isinstance(group, dict) else group)]
    flat = iter(torch.autograd.grad(loss, tensors, create_graph=create_graph, materialize_grads=True))
    return [
        {name: next(flat) for name in group} if isinstance(group, dict) else tuple(next(flat) for _ in group)
        for group in groups
    ]


def encoder_gradient(problem: BilevelProblem, encoded: EncoderPass, grad_h: torch.Tensor) -> Params:
    """From a gradient with respect to the global h to that with respect to theta, of the global batch."""
    if not encoded.params:
        return {}
    grad_h = grad_h.detach() if problem.ranks is None else problem.ranks.local_slice(grad_h.detach())
    grads = torch.autograd.grad(
        encoded.features,
        list(encoded.params.values()),
        grad_h.to(encoded.features.dtype),
        retain_graph=encoded.shared,
        materialize_grads=True,
    )
    named = dict(zip(encoded.params, grads))
    return named if problem.ranks is None else problem.ranks.sum(named)


@torch.no_grad()
def outer_loss_before(problem: BilevelProblem, h: torch.Tensor, inner_loss: torch.Tensor) -> torch.Tensor:
    """L_out at (theta, phi, w): what the inner step starts from.

    Args:
        problem: the problem.
        h: features of the global batch at theta.
        inner_loss: L_in there.
    """
    if problem.outer_encode is not None:
        h = problem.global_features(problem.outer_encode(problem.encoder_params))
    elif problem.outer_loss is problem.inner_loss:
        return inner_loss.detach()
    return problem.outer_loss(h, problem.head_params, problem.outer_params)


def relative_length(problem: BilevelProblem, adapted_theta: Params, adapted_phi: Params) -> torch.Tensor:
    """Length of the inner step by that of the parameters; 0 where there are none."""
    before = [*problem.encoder_params.values(), *problem.head_params.values()]
    after = [*adapted_theta.values(), *adapted_phi.values()]
    moved = get_total_norm([new - old for old, new in zip(before, after, strict=True)])
    size = get_total_norm(before)
    return moved / size.clamp(min=torch.finfo(size.dtype).tiny)
