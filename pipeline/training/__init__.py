"""The parts of a training run and its records."""
