"""The command line: `python -m contrastive_kernels info|demo|bench|tune`."""

import argparse
import platform
import sys
from importlib import import_module
from pathlib import Path

import torch

from contrastive_kernels import __version__
from contrastive_kernels.backends import CPU_ERROR, TRITON_ERROR, backends


def _info() -> int:
    lines = [
        ("contrastive_kernels", __version__),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("threads", torch.get_num_threads()),
        ("cpu capability", torch.backends.cpu.get_cpu_capability()),
    ]
    if CPU_ERROR is None:
        extension = import_module("contrastive_kernels._cpu")
        built = extension.build_info() | {"isa in use": extension.capability()}
        lines += [(f"cpu extension: {name}", value) for name, value in built.items()]
    for name, value in lines:
        print(f"{name:<28}{value}")

    row = "{:<11}{:<7}{:<8}{:<11}{}".format
    print("\n" + row("backend", "built", "usable", "devices", "dtypes"))
    yes_no = {True: "yes", False: "no"}
    report = backends()
    for name, backend in report.items():
        dtypes = " ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes) or "-"
        devices = " ".join(backend.devices)
        print(row(name, yes_no[backend.built], yes_no[backend.usable], devices, dtypes))
    for name, backend in report.items():
        if backend.reason is not None:
            print(f"\n{name} is not usable: {backend.reason}")
    return 0


def _bench(argv: list[str]) -> int:
    package = Path(__file__).parent
    installed = (package / "benchmarks").is_dir()
    if not installed:  # a checkout has them beside the package
        sys.path.insert(0, str(package.parent))
    name = f"{package.name}.benchmarks" if installed else "benchmarks"
    return import_module(f"{name}.run").main(argv)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m contrastive_kernels",
        description="Fused kernels for contrastive and whitening losses.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser(
        "info",
        help="versions, threads, and which backends are usable here, with the reason where not",
        description="Print versions, threads, and which backends are usable here and why not.",
    )
    # These have options of their own: they get the rest of the command line, --help included.
    commands.add_parser(
        "demo",
        add_help=False,
        help="train small encoders on real images, fused beside dense (demo --help: its options)",
    )
    commands.add_parser(
        "bench",
        add_help=False,
        help="time and memory beside dense torch and other packages (bench --help: its options)",
    )
    commands.add_parser(
        "tune",
        add_help=False,
        help="find the tiles of the Triton kernels for this GPU (tune --help: its options)",
    )
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "demo":
        return import_module("contrastive_kernels.demo").main(rest)
    if arguments.command == "bench":
        return _bench(rest)
    if arguments.command == "tune":
        if TRITON_ERROR is not None:
            print(f"tune cannot run: {TRITON_ERROR}", file=sys.stderr)
            return 2
        return import_module("contrastive_kernels.triton.tune").main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return _info()


if __name__ == "__main__":
    sys.exit(main())
