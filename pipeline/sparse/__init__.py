"""The mask engine: distributions, criteria, topology updates, exploration and FLOPs. Needs torch and numpy only."""
