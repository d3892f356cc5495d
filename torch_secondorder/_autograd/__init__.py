"""Graphs that can be differentiated twice."""
