"""Superposition of tickets into one network."""
