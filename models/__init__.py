"""What comes in: resolving a checkpoint, tasks, evaluation data, workloads."""
