"""Every key of a study's config. One entry a key; factors, tables and figures have a grammar of their own."""

from metamask_plugin.cli.schema import FORMS
from metamask_plugin.cli.settings import (
    Setting,
    block,
    flag,
    number,
    path,
    registry,
    sequence,
    text,
    whole,
    word,
)

STUDY: dict[str, Setting] = {
    "name": Setting("of its folder", "folder name"),
    "title": text("of the report"),
    "source": text("paper, and table or figure", null=True),
    "claim": text("what the paper says it shows", null=True),
    "size": text("paper, digits or smoke"),
    "seeds": sequence("of every combination", whole("a seed", 0, 2**32 - 1), null=True),
    "paper_seeds": sequence("where seeds is null", whole("a seed", 0, 2**32 - 1), null=True),
    "dir": path("trials, results and report go to <dir>/<name>"),
    "runs_dir": path("the pretraining runs, shared by all studies"),
    "overrides": sequence("of the pretraining config, behind --", text("key=value"), null=True),
    "checkpoint": Setting("encoders that are there already: a path, or a list"),
    "data": block("for checkpoints: over what the encoder was trained on", null=True),
    "report_only": flag("writes the report over what is finished"),
    "minutes": number("no new trial is begun after so many", 0, null=True),
    "quiet": flag("trials print to files"),
    "trial": whole("set by the sweeper", 0, null=True),
    "calibrating": flag("set by the sweeper"),
    "config": text("the pretraining config"),
    "settings": sequence("overrides of every trial", text("key=value"), null=True),
    "factors": block("levels by factor"),
    "measures": block("options by measure"),
    "baseline": block("the level that others are compared with", null=True),
    "tables": sequence("of the report", block("a table"), null=True),
    "figures": sequence("of the report", block("a figure"), null=True),
    "paper": Setting("the paper's numbers: grids, or the study whose they are; null for its own name's"),
    "roots": block("folders by data set"),
    "datasets": sequence("whose trials are run; null for all", text("a key of roots"), null=True),
    "equal_time": block("as long a training for all", null=True),
    "sizes": block("what a size changes"),
    "small_arms": Setting("levels that other keys refer to"),
    "smoke_arms": Setting("levels that other keys refer to"),
}

KNN_OR_LINEAR = text("of the features", matches=r"knn[1-9]\d*|linear", expected="knn<k> or linear")
ANY_CLASSIFIER = text("of the features", matches=r"knn[1-9]\d*|linear|mlp", expected="knn<k>, linear or mlp")
RATES = sequence("shares of the dimensions to drop", number("a share", 0, 1))
DRAWS = whole("masks of each rate", 1)
PROTOCOL = word("of the probe", registry("evaluation.linear:PROTOCOLS"))

MEASURE_OPTIONS: dict[str, dict[str, Setting]] = {
    "accuracy": {
        "ks": sequence("numbers of neighbours", whole("a number of neighbours", 1), expected="a list of k"),
        "temperature": number("of the votes", above=0),
        "protocol": PROTOCOL,
        "head": word("of the probe", registry("evaluation.linear:HEADS")),
    },
    "confounder_audit": {
        "classifier": KNN_OR_LINEAR,
        "rates": RATES,
        "draws": DRAWS,
        "banzhaf_masks": whole("random sets of dimensions", 3),
        "removal": word("the order of the removal", registry("evaluation.audit:REMOVALS")),
    },
    "cost": {},
    "few_labels": {
        "fractions": sequence("shares of the labels", number("a share", above=0, most=1)),
        "epochs": whole("instead of the protocol's", 1),
        "batch_size": whole("instead of the protocol's", 1),
        "lr": number("instead of the protocol's", above=0),
        "subset_seed": whole("of the draw", 0, 2**32 - 1),
    },
    "learned_mask": {
        "rates": RATES,
        "draws": DRAWS,
        "classifier": ANY_CLASSIFIER,
        "protocol": PROTOCOL,
    },
    "random_masking": {
        "rates": RATES,
        "draws": DRAWS,
        "classifiers": sequence("of the features", ANY_CLASSIFIER),
        "protocol": PROTOCOL,
    },
    "regions": {
        "fit_on": word("what the classifier learns from", registry("evaluation.regions:FIT_ON")),
        "k": whole("neighbours", 1),
        "protocol": PROTOCOL,
        "form": word("how a foreground is shown", FORMS),
    },
    "similarity": {},
}
"""Options of the measures, by measure; whether null is accepted is in their signatures."""
