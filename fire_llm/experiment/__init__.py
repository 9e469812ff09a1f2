"""A recipe becomes stages, stages are trained, and their checkpoints become results."""
