"""FFCV data sets: what a .beton file must look like, and the loaders that read it."""
