"""Process group, engines and gradient averaging."""
