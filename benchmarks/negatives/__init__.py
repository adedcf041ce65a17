"""How many negatives the losses need: python -m benchmarks.negatives"""
