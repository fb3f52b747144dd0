"""State, optimiser, steps, loop, checkpoints and metrics: what every recipe trains with."""
