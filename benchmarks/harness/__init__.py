"""Measuring: checks, time, peak memory, and how a result is told and drawn."""
