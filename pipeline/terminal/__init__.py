"""What a person sees while a command runs: streams that never end it, one live line, progress."""
