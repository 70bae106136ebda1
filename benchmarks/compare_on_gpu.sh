#!/usr/bin/env bash
# All methods side by side on a GPU, in one call: CIFAR-10, ResNet-18, batch 512, at equal epochs, then at equal
# time, then the map of accuracy against the cost of the meta step. The same call goes on where time was up.
#
#   benchmarks/compare_on_gpu.sh DATA OUT [MINUTES [EPOCHS [key=value ...]]]
#
# DATA has train/ and test/, one folder a class; OUT gets reports and runs. MINUTES is the time after which no new
# trial begins (9), EPOCHS those of every trial (15; the papers have 800 and 1,000). key=value goes to the pretraining.
set -euo pipefail
data=$1 out=$2 minutes=${3:-9} epochs=${4:-15}
shift $(($# < 4 ? $# : 4))
cd "$(dirname "$0")/.."
started=$SECONDS
for study in comparison_gpu comparison_gpu_equal_time estimators; do
    left=$(((minutes * 60 - (SECONDS - started)) / 60))
    if ((left < 1)); then
        echo "$minutes minutes are over; the same call goes on with $study"
        break
    fi
    python main_study.py --config-name "$study" minutes="$left" dir="$out/studies" runs_dir="$out/runs" -- \
        data.train_path="$data/train" data.val_path="$data/test" max_epochs="$epochs" "$@"
done
