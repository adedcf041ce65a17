"""The command line: its options, and the cases that they choose."""

import argparse
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch

import contrastive_kernels as ck
from contrastive_kernels.backends import unusable_reason

from .baselines.baseline import Baseline
from .baselines.loading import Lazy
from .cases import grid as grid_cases
from .cases import table
from .cases.case import Case
from .cases.step import DTYPES, PASSES
from .gpu import cases as gpu_cases
from .grid import order

PROGRAM = "python -m contrastive_kernels bench"
SIZES = ("n", "m", "d", "k")
DESCRIPTION = """\
Time, and peak memory, of the losses beside dense torch and other packages, on this machine.
Every implementation is first compared with float64: what is wrong has no number. Without options
the whole table of cases is measured, for many minutes; nothing else should run meanwhile."""
EXAMPLES = f"""\
examples:
  {PROGRAM} --quick
  {PROGRAM} --loss info_nce nt_xent -N 1024 4096 -D 256
  {PROGRAM} --loss clip_loss -N 512 1024 2048 4096 --plot clip
  {PROGRAM} --loss info_nce --peer all --json info_nce.json
  {PROGRAM} --group whitening --pass forward --dtype float64
  {PROGRAM} --device cuda --case info_nce --backend triton
  {PROGRAM} --base main --case info_nce nt_xent dcl_small
  {PROGRAM} --grid --minutes 10 --dtype float32

--peer takes the beginning of a baseline's name: dense, torch.compile, lightly. Those of other
packages are optional: pip install 'contrastive_kernels[bench]'

--base builds the commit in build/base the first time, and measures its package and this one in turn
with the cases of this checkout: ours and base in milliseconds, and ours / base. No peak memory.

--grid goes on with the file of this processor in benchmarks/results/grid, which --quick, --peer,
--pass and --backend leave alone. It measures coarsely first: stop it at any time.
ATEN_CPU_CAPABILITY=avx2 before it measures that instruction set, into a file of its own."""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[Case]]:
    """The options, and the cases in the order in which they are measured.

    Raises:
        SystemExit: --help, or an option that cannot be; its message is printed.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        if options.plot and find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib: pip install 'contrastive_kernels[bench]'")
        if options.device == "cuda" and not options.list and not torch.cuda.is_available():
            raise ValueError("--device cuda needs a GPU: torch.cuda.is_available() is False")
        if options.base and options.peer:
            raise ValueError("--base takes the place of the baselines: --peer does not go with it")
        _check_grid(options)
        for flag, path in (("--json", options.json), ("--plot", options.plot)):
            _check_file(flag, path)
        return options, chosen(options)
    except ValueError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage="%(prog)s [option ...]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def several(group: argparse._ArgumentGroup, *flags: str, **settings) -> None:
        group.add_argument(*flags, nargs="+", action="extend", **settings)

    what = parser.add_argument_group("what is measured")
    several(what, "--loss", metavar="NAME", help="the table's case of this function")
    several(what, "--case", metavar="NAME", help="a case of the table (--list names them)")
    several(what, "--group", metavar="NAME", help="all cases of a group")
    several(what, "--peer", metavar="NAME", help="these baselines alone; none; all, slow ones too")
    what.add_argument(
        "--quick", action="store_true",
        help="a minute: the large cases at a smaller size, with two baselines and few rounds",
    )  # fmt: skip
    what.add_argument(
        "--base", metavar="REF",
        help="the cases on the build of this git commit, or in this folder, instead of baselines",
    )  # fmt: skip
    what.add_argument(
        "--grid", action="store_true",
        help="losses over N, D and dtype beside dense torch, eager and compiled, for hours",
    )  # fmt: skip
    what.add_argument("--list", action="store_true", help="print the cases and their baselines")

    grid = parser.add_argument_group("with --grid")
    grid.add_argument(
        "--minutes", type=_positive, metavar="INT",
        help="points begin that should end by then, spread over the grid",
    )  # fmt: skip
    grid.add_argument(
        "--again", action="store_true", help="measure the points that the file has, too"
    )

    how = parser.add_argument_group("sizes and circumstances (several values: every combination)")
    for name, meaning in zip(
        SIZES,
        ("rows, or pairs of views", "negatives of their own", "features", "views or positives"),
        strict=True,
    ):
        several(how, f"-{name.upper()}", dest=name, type=_positive, metavar="INT", help=meaning)
    several(
        how,
        "--dtype",
        choices=DTYPES,
        metavar="DTYPE",
        help=f"of the features: {', '.join(DTYPES)}",
    )
    how.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu by default")
    how.add_argument("--backend", choices=ck.backends(), default="auto", help="of our loss: auto")
    how.add_argument(
        "--pass", dest="passes", choices=PASSES,
        help="time the forward pass under no_grad, the backward pass, or both",
    )  # fmt: skip
    how.add_argument(
        "--threads", type=_positive, default=torch.get_num_threads(),
        help="of torch on a CPU: %(default)s",
    )  # fmt: skip
    how.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True,
        help="peak memory, in a process of its own for each implementation; always on a GPU",
    )  # fmt: skip

    output = parser.add_argument_group("results")
    output.add_argument(
        "--json", type=Path, metavar="PATH",
        help="written after each case; without it only the whole table in a checkout has a file",
    )  # fmt: skip
    output.add_argument("--plot", type=Path, metavar="PATH", help="PATH.svg and PATH.png")
    return parser


def _check_grid(options: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: an option does not go with the grid, or with anything else.
    """
    if not options.grid:
        alone = {"--minutes": options.minutes, "--again": options.again}
        given = [flag for flag, value in alone.items() if value]
        if given:
            raise ValueError(f"{given[0]} goes with --grid")
        return
    others = {
        "--base": options.base, "--group": options.group, "--device cuda": options.device == "cuda",
        "-M": options.m, "-K": options.k,
    }  # fmt: skip
    for flag, value in others.items():
        if value:
            raise ValueError(f"{flag} does not go with --grid")


def _check_file(flag: str, path: Path | None) -> None:
    """Makes the folder of a file that is to be written: better now than after the first case.

    Raises:
        ValueError: it cannot be written.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag} must be a file that can be written: {error}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{flag} must be a file that can be written, got {path}")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer > 0, got {text}")
    return int(text)


def named(options: argparse.Namespace) -> bool:
    """Whether cases were chosen, in any way."""
    sizes = any(getattr(options, name) for name in SIZES)
    return bool(options.loss or options.case or options.group or options.quick or sizes)


def chosen(options: argparse.Namespace) -> list[Case]:
    """The cases that the options choose.

    Raises:
        ValueError: an option does not go with the table, or with another.
    """
    if options.grid:
        options = _with_grid(options)
    cases = [changed for case in _rows(options) for changed in _changed(case, options)]
    cases = list(_with_baselines(cases, options))
    return order.coarse_first(cases) if options.grid else cases


def _with_grid(options: argparse.Namespace) -> argparse.Namespace:
    """The options with the sizes and dtypes of the grid where none are given."""
    sizes = order.QUICK if options.quick else order.WHOLE
    given = vars(options)
    whole = {name: given[name] or list(values) for name, values in sizes._asdict().items()}
    return argparse.Namespace(**given | whole)


def _rows(options: argparse.Namespace) -> list[Case]:
    """The rows of the table."""
    cases = (gpu_cases if options.device == "cuda" else table).CASES
    if options.grid:
        cases = grid_cases.CASES
    if not named(options) or options.grid and not (options.loss or options.case):
        return list(cases.values())
    losses = _losses(cases.values())
    groups: dict[str, list[Case]] = {}
    for case in cases.values():
        groups.setdefault(case.group, []).append(case)
    if not (options.loss or options.case or options.group):
        return groups["large"]
    picked = [_one("--loss", losses, name) for name in options.loss or ()]
    picked += [_one("--case", cases, name) for name in options.case or ()]
    picked += [case for name in options.group or () for case in _one("--group", groups, name)]
    return list({case.name: case for case in picked}.values())


def _losses(cases: Iterable[Case]) -> dict[str, Case]:
    """The case of every function: the one of its name, or the first."""
    found: dict[str, Case] = {}
    for case in cases:
        name = getattr(case.loss, "__name__", None)
        if name and (name not in found or case.name == name):
            found[name] = case
    return found


def _one(flag: str, values: dict, name: str):
    if name not in values:
        raise ValueError(f"{flag} must be one of {', '.join(values)}, got {name}")
    return values[name]


def _changed(case: Case, options: argparse.Namespace) -> Iterator[Case]:
    """A row with the sizes, dtypes, pass and backend that were asked for."""
    if options.quick and not options.grid:
        case = replace(case.resized(case.sizes.quick()), bfloat16_at_most=None)
        case = replace(case, baselines=case.baselines[:2])
    if options.backend != "auto":
        if isinstance(case.loss, Lazy):
            raise ValueError(f"--backend: {case.name} stands in for a class without that option")
        if reason := unusable_reason(options.backend, options.device):
            raise ValueError(f"--backend {options.backend} is not usable here: {reason}")
        case = replace(case, backend=options.backend, bounded=False)
    if options.passes not in (None, case.passes):
        case = replace(case, passes=options.passes, bounded=False)
    for dtype in options.dtype or (None,):
        variant = case
        if dtype is not None:
            variant = replace(
                case, dtype=DTYPES[dtype], bfloat16_at_most=None,
                bounded=case.bounded and case.dtype == DTYPES[dtype],
            )  # fmt: skip
        yield from _resized(variant, options)


def _resized(case: Case, options: argparse.Namespace) -> Iterator[Case]:
    given = {name: getattr(options, name) for name in SIZES if getattr(options, name)}
    if not given:
        yield case
        return
    for name in given:
        if name not in case.inputs.sizes:
            takes = " ".join(f"-{size.upper()}" for size in SIZES if size in case.inputs.sizes)
            raise ValueError(f"-{name.upper()} does not go with {case.name}, which takes {takes}")
    for values in product(*given.values()):
        sizes = dict(zip(given, values, strict=True))
        made = case.sizes
        if "n" in sizes and (options.grid or "m" not in case.inputs.sizes):
            made = made.with_rows(sizes["n"])
        yield replace(case.resized(replace(made, **sizes)), memory=not options.grid)


def _with_baselines(cases: list[Case], options: argparse.Namespace) -> Iterator[Case]:
    """The cases with those of their baselines that are asked for."""
    every = {baseline.name: None for case in cases for baseline in case.baselines}
    for name in options.peer or ():
        begins = any(_plain(known).startswith(_plain(name)) for known in every)
        if not begins and name not in ("all", "none"):
            choice = ", ".join(("none", "all", *every))
            raise ValueError(f"--peer must be the beginning of one of {choice}, got {name}")
    names = [_plain(name) for name in options.peer or ()]

    def wanted(baseline: Baseline) -> bool:
        if options.base:
            return False
        if not names:
            return not baseline.on_request
        return "all" in names or any(_plain(baseline.name).startswith(name) for name in names)

    for case in cases:
        yield replace(case, baselines=tuple(filter(wanted, case.baselines)))


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
