"""Data sets on disk, read without torch: FFCV files with their sidecars, folders, staging."""
