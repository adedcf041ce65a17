"""How time and peak memory grow: python -m benchmarks.scaling"""
