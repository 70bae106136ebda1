"""What a meta step costs, and how far each estimator is from the truth.

    python benchmarks/step_cost.py [--backbone resnet18] [--batch 32] [--rounds 5]

The unit is one SimCLR + Barlow Twins step (forward and backward of the regular loss) of the same
model on the same batch. Every round times the unit and each estimator in turn, so that whatever the
machine does meanwhile meets them all; the ratio is the median over rounds of the quotient within a
round. The error is relative to the unrolled oracle in float64, on the same weights and batch.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf

from metamask_plugin.bilevel import (
    Estimator,
    Exact,
    FiniteDifference,
    FirstOrder,
    PlainStep,
    Trial,
    Unrolled,
)
from metamask_plugin.methods import MetaMask

ESTIMATORS: dict[str, Estimator] = {
    "exact": Exact(),
    "unrolled": Unrolled(),
    "finite difference, r = 1e-2": FiniteDifference(1e-2),
    "finite difference, r = 1e-4": FiniteDifference(1e-4),
    "first order": FirstOrder(),
}


def build_model(backbone: str, size: int) -> MetaMask:
    """MetaMask with the paper's heads and a mask off its starting point."""
    cfg = OmegaConf.create(
        {
            "method": "metamask",
            "backbone": {"name": backbone},
            "data": {"dataset": "cifar10", "num_classes": 10, "num_large_crops": 2, "num_small_crops": 0},
            "augmentations": [{"crop_size": size, "num_crops": 2}],
            "max_epochs": 1,
            "optimizer": {"name": "sgd", "batch_size": 1, "lr": 0.1, "classifier_lr": 0.1, "weight_decay": 0},
            "scheduler": {"name": "none"},
        }
    )
    model = MetaMask(cfg)
    model.mask.weight.data += 0.1 * torch.randn_like(model.mask.weight)
    return model


def regular_step(model: MetaMask, views: list[torch.Tensor]) -> None:
    """The unit: forward and backward of Eq. (5), without the optimiser."""
    loss, *_ = model.regular_loss({"feats": [model.backbone(x) for x in views]}, model.target_features(views))
    loss.backward()
    model.zero_grad()


def seconds(step) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_costs(model: MetaMask, views: list[torch.Tensor], trial: Trial, rounds: int) -> dict[str, list]:
    """Quotients to the unit, one a round, by estimator; the first, cold round is dropped."""
    problem = model.meta_problem(views)
    ratios: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    for round_index in range(rounds + 1):
        unit = seconds(lambda: regular_step(model, views))
        for name, estimator in ESTIMATORS.items():
            ratio = seconds(lambda e=estimator: e.gradient(problem, trial)) / unit
            if round_index > 0:
                ratios[name].append(ratio)
        print(f"round {round_index}/{rounds}: unit {unit:.2f} s", flush=True)
    return ratios


def measure_errors(model: MetaMask, views: list[torch.Tensor], trial: Trial) -> dict[str, dict[str, float]]:
    """Relative error and cosine against the float64 oracle, computing in float64 and in float32."""
    double = copy.deepcopy(model).double()
    problems = {
        "float64": double.meta_problem([x.double() for x in views]),
        "float32": model.meta_problem(views),
    }
    truth = Unrolled().gradient(problems["float64"], trial).weights[0]
    errors: dict[str, dict[str, float]] = {}
    for name, estimator in ESTIMATORS.items():
        errors[name] = {}
        for dtype, problem in problems.items():
            ours = estimator.gradient(problem, trial).weights[0].double()
            errors[name][dtype] = ((ours - truth).norm() / truth.norm()).item()
            errors[name][f"cosine_{dtype}"] = torch.cosine_similarity(ours, truth, dim=0).item()
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, default=32, help="side of the images, pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.1, help="length of the trial step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(args.backbone, args.size).to(device)
    views = [torch.randn(args.batch, 3, args.size, args.size, device=device) for _ in range(2)]
    trial = Trial(PlainStep(args.lr), PlainStep(args.lr))

    ratios = measure_costs(model, views, trial, args.rounds)
    errors = measure_errors(model, views, trial)
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"\n{args.backbone}, {args.size} px, batch {args.batch}, trial step {args.lr}, seed {args.seed}, "
        f"{hardware}, torch {torch.__version__}\n"
        "cost: the meta step alone, in SimCLR + Barlow steps (median, min - max over rounds)\n\n"
        f"{'estimator':30}{'cost':>6}{'range':>15}{'error f64':>12}{'error f32':>12}{'cosine f64':>12}"
    )
    for name, values in ratios.items():
        error = errors[name]
        print(
            f"{name:30}{statistics.median(values):6.2f}{min(values):8.2f} -{max(values):5.2f}"
            f"{error['float64']:12.1e}{error['float32']:12.1e}{error['cosine_float64']:12.3f}"
        )
    if args.json:
        settings = {key: str(value) if key == "json" else value for key, value in vars(args).items()}
        record = {
            "settings": settings,
            "hardware": {"device": hardware, "machine": platform.machine()},
            "torch": torch.__version__,
            "cost": ratios,
            "error": errors,
        }
        args.json.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
