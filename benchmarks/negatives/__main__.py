"""The command: python -m benchmarks.negatives --help"""

import sys

from .run import main

if __name__ == "__main__":
    sys.exit(main())
