"""The table and the picture."""

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from .data import ImageSet
from .evaluate import DRAWS, LABELS_PER_CLASS, Accuracy, features
from .measure import LOSSES, Cost, Measured, Million
from .trial import Outcome

FUSED, DENSE, GREY = "#0b5cad", "#f2a33a", "#555555"
VARIANTS = tuple(LOSSES)


class Trial(NamedTuple):
    """One loss on one set of images, trained twice."""

    images: ImageSet
    loss: str
    outcomes: dict[str, Outcome]  # by variant

    def difference(self) -> float:
        """The largest difference of the two loss curves over all steps."""
        fused, dense = (np.array(self.outcomes[name].curve) for name in VARIANTS)
        return float(np.abs(fused - dense).max())


class Results(NamedTuple):
    """Everything the demo found out."""

    trials: list[Trial]
    baselines: dict[str, dict[str, Accuracy]]  # name of the image set -> name of the baseline
    small: dict[str, Measured]  # by loss, at the size of the training
    large: dict[str, Measured]  # by loss, at one size for all
    million: Million | None


def table(results: Results) -> str:
    """Accuracies, agreement of the curves, time and memory, and what the columns mean."""
    case = next(iter(results.large.values())).case
    large = f"{case.images} images x {case.dim}"
    lines = [
        f"{'':30}as they are       moved       curves    size of training   {large:^19}".rstrip(),
        f"{'':28}probe   5-NN   probe   5-NN   differ       ms       MB        ms       MB",
    ]
    measured = set()
    for images in dict.fromkeys(trial.images.name for trial in results.trials):
        trials = [trial for trial in results.trials if trial.images.name == images]
        train, test = len(trials[0].images.train), len(trials[0].images.test)
        lines += ["", f"{images}: {train} to train on, {test} to test"]
        for name, accuracy in results.baselines[images].items():
            lines.append(f"  {name:23}{_percent(accuracy)}")
        for trial in trials:
            # What a loss costs does not depend on the images.
            costs = [] if trial.loss in measured else [results.small, results.large]
            measured.add(trial.loss)
            for variant in VARIANTS:
                first = variant == VARIANTS[0]
                line = f"  {trial.loss if first else '':17}{variant:6}"
                line += _percent(trial.outcomes[variant].accuracy)
                line += " " * 9 if first else f"{trial.difference():9.0e}"
                line += " ".join(_cost(table[trial.loss].costs[variant]) for table in costs)
                lines.append(line.rstrip())
    return "\n".join(lines + ["", *_notes(results)])


def _notes(results: Results) -> list[str]:
    moved = results.trials[0].images.moved
    cases = [measured.case for measured in results.small.values()]
    sizes = ", ".join(f"{case.loss} {case.images} x {case.dim}" for case in cases)
    negatives = ", ".join(
        f"{case.loss} {case.negatives} and {results.large[case.loss].case.negatives}"
        for case in cases
        if case.negatives
    )
    return [
        "probe, 5-NN: % of the test images classified right from frozen features, by logistic"
        f" regression on {LABELS_PER_CLASS}",
        f"  labels per class (mean of {DRAWS} draws), and by the 5 nearest of all training images."
        " moved: each test image is",
        f"  turned by up to {moved.degrees:.0f} degrees, shifted and scaled. Upright digits with"
        " all labels are easy for raw pixels; few",
        "  labels and moved images show what training without labels adds.",
        "fused, dense: this package, and the formula of the loss in plain PyTorch, from the same"
        " seed. differ: the largest",
        "  difference between the two loss curves. ms, MB: the loss alone, forward and backward,"
        " and its peak memory beyond",
        "  the inputs, in a process of its own.",
        f"size of training: {sizes}.",
        f"  Negatives there and at the large size: {negatives}; nt_xent and cacr: the",
        "  rest of the batch. cacr has 4 positives.",
    ]


def million_lines(million: Million) -> str:
    """What one step with very many negatives took, beside what a dense loss would ask for."""
    logits = 4 * million.queries * million.negatives
    inputs = 2 * million.negatives * million.dim
    return (
        f"One InfoNCE step, {million.queries} queries x {million.negatives:,} negatives,"
        f" D = {million.dim}: {million.cost.seconds:.2f} s and {_megabytes(million.cost.peak)} MB"
        f" beyond the negatives ({_megabytes(inputs)} MB in bfloat16).\n"
        f"  Loss {million.loss:.4f}; a plain loop in float32 gives {million.expected:.4f}. A dense"
        f" loss would hold the logits and their gradient: {2 * logits / 1e9:.1f} GB."
    )


def picture(results: Results, path: Path, seed: int) -> None:
    """Curves of every training, the moved test digits before and after, and the peak memory."""
    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
    }
    with matplotlib.rc_context(style):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
        figure = Figure(figsize=(13, 7.6), layout=layout)
        top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.45], squeeze=False)[:, 0]
        top.suptitle("The same training with the fused and with the dense loss", fontsize=12)
        bottom.suptitle("What an encoder learned, and what the losses need", fontsize=12)
        curves = top.subplots(1, len(results.trials), sharex=True)
        for axes, trial in zip(np.atleast_1d(curves), results.trials, strict=True):
            _curves(axes, trial)
        np.atleast_1d(curves)[0].legend(frameon=False)

        raw, learned, memory = bottom.subplots(1, 3, width_ratios=[1, 1, 0.9])
        first = results.trials[0]
        labels = first.images.test_labels
        _embedding(raw, features(None, first.images.moved_test(seed)), labels, seed)
        raw.set_title(f"t-SNE of the moved test {first.images.name}, raw pixels")
        _embedding(learned, first.outcomes["fused"].moved, labels, seed)
        learned.set_title(f"the same, encoder trained with {first.loss}, no labels")
        _memory(memory, results.large)
        figure.savefig(path, dpi=110, facecolor="white")


def _percent(accuracy: Accuracy) -> str:
    return "{:9.1f}{:7.1f}{:8.1f}{:7.1f}".format(*(100 * share for share in accuracy))


def _cost(cost: Cost) -> str:
    return f"{1000 * cost.seconds:9.1f}{_megabytes(cost.peak):>9}"


def _megabytes(size: float) -> str:
    return "<1" if size < 1e6 else f"{size / 1e6:.0f}"


def _curves(axes: Axes, trial: Trial) -> None:
    axes.plot(trial.outcomes["dense"].curve, color=DENSE, linewidth=4, label="dense")
    axes.plot(trial.outcomes["fused"].curve, color=FUSED, linewidth=1, label="fused")
    axes.set_title(f"{trial.loss}\n{trial.images.name}")
    axes.set_xlabel("step")


def _embedding(axes: Axes, points: np.ndarray, labels: np.ndarray, seed: int) -> None:
    """t-SNE of the points in the plane, every class with its digit as the marker."""
    with threadpool_limits(1):  # so few points gain nothing from threads that wait for each other
        points = PCA(min(30, *points.shape), random_state=seed).fit_transform(points)
        plane = TSNE(init="pca", max_iter=500, random_state=seed).fit_transform(points)
    colors = matplotlib.colormaps["tab10"]
    for label in np.unique(labels):
        chosen = plane[labels == label]
        axes.scatter(
            chosen[:, 0],
            chosen[:, 1],
            s=26,
            marker=f"${label}$",
            color=colors(label % 10),
            linewidth=0.3,
        )
    axes.set_axis_off()


def _memory(axes: Axes, large: dict[str, Measured]) -> None:
    """Horizontal bars, fused above dense, on a logarithmic axis."""
    for row, variant in enumerate(VARIANTS):
        peaks = [measured.costs[variant].peak for measured in large.values()]
        places = np.arange(len(large)) + (row - 0.5) * 0.36
        sizes = [max(peak / 1e6, 1.0) for peak in peaks]
        bars = axes.barh(places, sizes, height=0.34, color=(FUSED, DENSE)[row], label=variant)
        axes.bar_label(bars, [_megabytes(peak) for peak in peaks], padding=3, color=GREY)
    case = next(iter(large.values())).case
    axes.set_title(f"peak MB of the loss, {case.images} images x {case.dim}, log scale")
    axes.set_xscale("log")
    axes.set_xlim(0.5, None)
    axes.xaxis.set_visible(False)  # the bars carry their numbers
    axes.spines.bottom.set_visible(False)
    axes.set_yticks(range(len(large)), large)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.legend(frameon=False, loc="lower right")
