"""What ours is compared with: dense torch, and the losses of other packages."""
