"""The papers' claims, run again: trains, judges, and writes docs/claims.md.

python -m benchmarks.claims                # what results lack, side by side: under 2 hours, 2 cores
python -m benchmarks.claims --part eqco    # one part
python -m benchmarks.claims --quick        # a few steps of everything, minutes: does it run?
python -m benchmarks.claims --plan         # what a run would cost
"""

import argparse
import sys
from pathlib import Path

from . import report
from .plan import PARTS, lines
from .run import run


def main(argv: list[str] | None = None) -> int:
    """Does what is asked for; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="only this one")
    parser.add_argument("--quick", action="store_true", help="nothing is kept, but by --output")
    parser.add_argument("--output", type=Path, help="the folder where results go")
    parser.add_argument("--alone", action="store_true", help="one training at a time, in here")
    parser.add_argument("--plan", action="store_true", help="only print trainings and their cost")
    parser.add_argument("--plot", action="store_true", help="only draw the results again")
    parser.add_argument("--report", action="store_true", help="only write the page again")
    parser.add_argument(
        "--check", action="store_true", help="only compare the page; 1 when it disagrees"
    )
    options = parser.parse_args(argv)
    names = options.part or list(PARTS)
    if options.plan:
        print("\n".join(lines(names, options.quick)))
        return 0
    if options.check:
        return report.update(check=True)
    kept = not (options.quick or options.output)
    if not (options.plot or options.report):
        folder = report.FOLDER if kept else options.output
        for name in names:
            part = PARTS[name]
            path = folder / f"{name}.json" if folder else None
            settings = part.quick if options.quick else part.full
            command = f"python -m benchmarks.claims {part.command}"
            try:
                result = run(name, settings, path, command, apart=not options.alone)
            except KeyboardInterrupt:
                print("\nstopped; every training that was finished is kept", file=sys.stderr)
                return 130
            for claim in report.judged({name: result})[name]:
                print(f"{claim.verdict():9s} {claim.text}")
        if not kept:
            return 0
    if options.plot or not options.report:
        for path in report.plot():
            print(f"wrote {path.name}")
    return report.update(check=False) if options.report or not options.plot else 0


if __name__ == "__main__":
    sys.exit(main())
