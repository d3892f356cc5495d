"""Machinery that optimizers share."""
