"""Assemble the parts of a training run, and keep its records."""
