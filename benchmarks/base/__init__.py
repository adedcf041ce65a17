"""The cases against the build of another commit: bench --base"""
