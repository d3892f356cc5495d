"""Machinery of optimizers that scale each coordinate by its curvature."""
