"""Everything around a method in a training run: folder, checkpoints, resuming, callbacks, ranks, report."""
