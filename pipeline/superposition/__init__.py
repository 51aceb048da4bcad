"""Superpose tickets into one network."""
