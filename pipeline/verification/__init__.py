"""Verify what a run claims: without running it again, and by running segments of it again (docs/verification.md)."""
