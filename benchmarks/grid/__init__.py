"""Where ours is faster: losses over rows, features and dtypes, `bench --grid`."""
