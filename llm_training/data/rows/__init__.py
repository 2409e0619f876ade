"""Tokens as rows: which ones, in which order, for which process."""
