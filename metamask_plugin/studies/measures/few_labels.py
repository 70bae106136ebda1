"""Fine-tuning on a fixed share of the labels, after ICL-MSR's Table 4."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from metamask_plugin.errors import check
from metamask_plugin.evaluation.finetune import FRACTION_SEED, finetune, simclr_protocol
from metamask_plugin.studies.subject import Measured, Subject


def few_labels(
    subject: Subject,
    fractions: Sequence[float] = (0.01, 0.1),
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    subset_seed: int = FRACTION_SEED,
    subset_files: Sequence[str] | None = None,
) -> Measured:
    """Rows ``finetuned``, ``finetuned_best`` (epoch), ``finetuned_top5``, by share in the column ``labels``.

    Args:
        subject: the encoder, which stays as it is, and its images.
        fractions: shares of the labelled training images.
        epochs: instead of the protocol's 60 (1 %) and 30 (10 %).
        batch_size: instead of 256; the learning rate goes with it.
        lr: instead of the protocol's, as it is used.
        subset_seed: which images are labelled: the same for all encoders and seeds.
        subset_files: lists of file names, one for each of ``fractions``, such as SimCLR's ``1percent.txt``:
            what is labelled instead of a draw.
    """
    several = f"a list of {len(fractions)} files, one for each of {list(fractions)}"
    fits = subset_files is None or not isinstance(subset_files, str) and len(subset_files) == len(fractions)
    check(fits, "measures.few_labels.subset_files", several, subset_files)
    files = dict(zip(fractions, subset_files or ()))

    def rows(checkpoint: str) -> list[dict[str, Any]]:
        found = []
        for fraction in fractions:
            protocol = simclr_protocol(fraction, **({} if batch_size is None else {"batch_size": batch_size}))
            changed = {"epochs": epochs, "lr": lr}
            given = {key: value for key, value in changed.items() if value is not None}
            result = finetune(
                subject.encoders[checkpoint].backbone,
                subject.data,
                fraction,
                replace(protocol, **given),
                seed=subject.seed,
                device=subject.device,
                subset_seed=subset_seed,
                subset_file=files.get(fraction),
            )
            values = {
                "finetuned": result.acc1_last,
                "finetuned_best": result.acc1_best,
                "finetuned_top5": result.acc5_last,
                "labelled_images": float(result.images),
            }
            labels = _percent(fraction)
            found += [
                {"labels": labels, "metric": metric, "value": value} for metric, value in values.items()
            ]
        return found

    shares = ", ".join(map(_percent, fractions))
    which = f"those in {', '.join(files.values())}" if files else f"drawn class by class, seed {subset_seed}"
    return Measured(subject.by_checkpoint(rows), about=f"{shares} of the labels: {which}")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:g} %"
