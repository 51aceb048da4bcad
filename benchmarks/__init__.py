"""Side-by-side measurements.

Each module prints one line a bar; a slow result is a line to read, only a wrong one fails.
"""
