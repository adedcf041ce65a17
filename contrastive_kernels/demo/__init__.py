"""`python -m contrastive_kernels demo`: train small encoders on real images, fused beside dense."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = {
    "numpy": "numpy",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
}


def main(argv: list[str]) -> int:
    """Run the demo with these command-line options; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m contrastive_kernels demo",
        description="Train small encoders on real images without labels, each loss fused and"
        " dense from the same seed; print a table and write a picture. No download, no GPU.",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--steps", type=_positive, help="training steps per encoder (default: 200, quick: 20)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output"),
        help="folder of the picture (default: ./%(default)s)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a short look: few steps, small sizes, poor accuracy"
    )
    options = parser.parse_args(argv)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: must be a folder that can be written: {error}")

    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        names = " ".join(missing)
        print(f"The demo needs packages that are not here: pip install {names}", file=sys.stderr)
        return 1
    try:
        # Not at the top: what it imports may be missing, and `--help` should be quick.
        from .run import run

        run(options.seed, options.steps, options.output, options.quick)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer > 0, got {text}")
    return value
