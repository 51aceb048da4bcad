"""Development tools: the environment of a checkout, emulated hosts."""
