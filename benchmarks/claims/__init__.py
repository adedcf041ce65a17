"""The papers' claims, run again: python -m benchmarks.claims"""
