"""The command line: `python -m contrastive_kernels info|demo|bench|tune`."""

import argparse
import itertools
import platform
import sys
import time
from importlib import import_module
from pathlib import Path

import torch

from contrastive_kernels import __version__, selfcheck
from contrastive_kernels.backends import CPU_ERROR, TRITON_ERROR, backends


def _info(check: bool, record: bool) -> int:
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
    without = report["triton"].engines["hopper"]
    if report["triton"].usable:
        print(f"\nengine of triton: {'hopper' if without is None else f'triton, since {without}'}")
    print(f"\n{_summary()}")
    return _check(record) if check or record else 0


def _summary() -> str:
    """What runs on this machine, and the cure for what does not, in one line."""
    report = backends()
    kinds = {"cpu": "CPU"} | ({"triton": "CUDA"} if torch.cuda.is_available() else {})
    runs = []
    for name, kind in kinds.items():
        reason = report[name].reason
        first = (reason or "").partition("\n")[0]
        runs.append(f"{kind} tensors run " + ("fused" if reason is None else f"dense: {first}"))
    return "; ".join(runs if len(runs) > 1 else [*runs, "there is no GPU here"])


def _check(record: bool) -> int:
    start, count, wrong = time.perf_counter(), 0, 0
    for title, fault in itertools.chain(selfcheck.faults(), selfcheck.of_hopper(record)):
        count += 1
        if fault is not None:
            wrong += 1
            print(f"{title}: {fault}")
    seconds = time.perf_counter() - start
    if count == 0:
        print("nothing to check: everything runs dense here")
        return 1
    print(
        f"{count} checks of primitives against float64 in {seconds:.1f} s: "
        + (f"{wrong} failed" if wrong else "OK")
    )
    return 1 if wrong else 0


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
    info = commands.add_parser(
        "info",
        help="versions, threads, and which backends are usable here, with the reason where not",
        description="Print versions, threads, and which backends are usable here and why not; the "
        "last line says what runs fused.",
    )
    info.add_argument(
        "--check",
        action="store_true",
        help="run every primitive against float64 too, in seconds; status 1 if one is wrong",
    )
    info.add_argument(
        "--record",
        action="store_true",
        help="--check, and where the engine for Hopper passes, it is used from then on",
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
    return _info(arguments.check, arguments.record)


if __name__ == "__main__":
    sys.exit(main())
