"""Results of benchmarks as data: kept per release, compared, and written into documents.

`scripts/bench.py release` measures, `compare` says what changed, and `tables` fills documents. The
files are in `scripts/benchmarks/figures/<version>/`.
"""
