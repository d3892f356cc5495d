"""Objectives: closures and functions that can be evaluated, tried and accepted."""
