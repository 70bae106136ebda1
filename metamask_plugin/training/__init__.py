"""What a training run needs around a method: its folder, checkpoints, history, progress, online kNN."""
