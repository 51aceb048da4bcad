"""Tickets: sparse networks as files. ``format`` turns them into bytes and back, ``store`` keeps them in a folder."""
