"""Long campaigns, each a command; tests run a short version. See ``tests/README.md``."""
