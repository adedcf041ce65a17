"""Peers as they are installed, with whatever torchvision comes with them."""

from benchmarks.peers import declare_torchvision

declare_torchvision()
