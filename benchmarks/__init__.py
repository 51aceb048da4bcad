"""Side-by-side measurements, one command per module; ``benchmarks/README.md`` lists them.

Each prints one line per result. A slow result is printed; only a wrong result ends the command with
an error.
"""
