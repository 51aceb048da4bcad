"""Long campaigns, each a command of its own; tests run a short version."""
