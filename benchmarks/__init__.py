"""Speed and memory of the losses beside the code a trainer would use instead."""
