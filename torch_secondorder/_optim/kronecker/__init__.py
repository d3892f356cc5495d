"""Matrices of parameters, cut into blocks that have a Kronecker factor for each side."""
