"""Does the trainings of a part that its result lacks, side by side, and keeps each at once."""

import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from contrastive_kernels.demo.processes import side_by_side

from ..harness.console import Progress
from ..harness.environment import describe, save
from .part import Study, Task
from .plan import PARTS, measure

PACKAGES = ("numpy", "scikit-image", "scikit-learn")


def timed(name: str, task: Task, settings: dict, chosen: dict) -> dict:
    """A record: the task, what was measured, and the seconds it computed."""
    start = time.process_time()
    measured = measure(name, task, settings, chosen)
    return task | measured | {"seconds": round(time.process_time() - start, 2)}


def run(name: str, settings: dict, path: Path | None, command: str, *, apart: bool = False) -> dict:
    """The result of a part, complete. With a path every training is saved as it ends, and one that
    is there is not done again.

    Args:
        apart: in as many processes as torch has threads, one thread each; else here.

    Raises:
        SystemExit: the file there has other settings.
    """
    part = PARTS[name]
    result = begun(name, settings, path, command)
    done: list[dict] = result["records"]
    tasks = part.tasks(settings)
    whole = sum(part.seconds(task, settings) for task in tasks)
    progress = Progress(name)

    def keep(record: dict) -> None:
        done.append(record)
        if path is not None:
            save(path, result)
        share = sum(part.seconds(record, settings) for record in done) / whole
        spent = sum(each["seconds"] for each in done) / 60
        progress(f"{len(done)} of {len(tasks)} trainings, {share:.0%}, {spent:.1f} CPU min")

    for tuning in (True, False):
        stage = [task for task in tasks if (task["kind"] == "tuning") == tuning]
        missing = [task for task in stage if not any(same(task, record) for record in done)]
        result["chosen"] = part.choose(settings, Study(done))
        train([(name, task, settings, result["chosen"]) for task in missing], keep, apart)
    # in the order of the plan, whichever ended first
    done.sort(key=lambda record: next(i for i, task in enumerate(tasks) if same(task, record)))
    if path is not None:
        save(path, result)
    progress.close()
    return result


def train(arguments: list[tuple], keep: Callable[[dict], None], apart: bool) -> None:
    """Gives each record to `keep`."""
    if apart and arguments:
        side_by_side(timed, arguments, lambda steps: None, lambda index, record: keep(record))
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for each in arguments:
            keep(timed(*each))
    finally:
        torch.set_num_threads(threads)


def same(task: Task, record: dict) -> bool:
    """Whether a record is of this training."""
    return all(record.get(key) == value for key, value in task.items())


def begun(name: str, settings: dict, path: Path | None, command: str) -> dict:
    """What is there of a result, or a new one."""
    if path is not None and path.exists():
        result = json.loads(path.read_text())
        if result["settings"] != settings:
            raise SystemExit(f"{path} was made with other settings: move it away")
        return result
    return {
        "part": name,
        "command": command,
        "date": date.today().isoformat(),
        "environment": describe(1, PACKAGES),
        "settings": settings,
        "chosen": {},
        "records": [],
    }
