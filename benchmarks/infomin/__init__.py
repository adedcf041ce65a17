"""How much two views should share: python -m benchmarks.infomin"""
