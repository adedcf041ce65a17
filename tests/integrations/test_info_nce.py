"""info-nce-pytorch, fused, against its own."""

from __future__ import annotations

import pytest
from oracles import randn

pytest.importorskip("info_nce")
import info_nce as peer  # noqa: E402
from conformance import assert_conforms, clustered  # noqa: E402

from contrastive_kernels.integrations import info_nce as fused  # noqa: E402

TEMPERATURES = [1.0, 0.07, 0.01]
MODES = [("unpaired", (41, 7)), ("paired", (13, 5, 7))]
MODES = MODES if "negative_mode" in fused.OPTIONS else MODES[:1]
REDUCTIONS = ["mean", "sum", "none"] if "reduction" in fused.OPTIONS else ["mean"]
in_batch = pytest.mark.skipif(
    "tau" in fused.OPTIONS, reason="0.1.0 has no in-batch negatives, and asserts"
)


def losses(temperature: float, reduction: str = "mean", mode: str = "unpaired") -> list:
    """Ours and theirs, with those of the options that the version has."""
    values = {"temperature": temperature, "tau": temperature, "reduction": reduction}
    options = {name: (values | {"negative_mode": mode})[name] for name in fused.OPTIONS}
    return [module.InfoNCE(**options) for module in (fused, peer)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("mode", "shape"), MODES)
def test_negatives(mode, shape, temperature, reduction):
    query = clustered(13, 7)
    inputs = [query, query + 0.3 * randn(13, 7, seed=1), clustered(*shape, seed=2)]
    assert_conforms(*losses(temperature, reduction, mode), inputs)


@in_batch
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("n", [1, 2, 31])
@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_in_batch(n, temperature):
    query = clustered(n, 9)
    inputs = [query, query + 0.3 * randn(n, 9, seed=1)]
    assert_conforms(*losses(temperature), inputs)


@in_batch
@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_what_does_not_fit_raises_the_peers_error():
    query = clustered(5, 3)
    if "negative_mode" in fused.OPTIONS:
        with pytest.raises(ValueError, match="must have 3 dimensions"):
            fused.info_nce(query, query, query, negative_mode="paired")
    with pytest.raises(ValueError, match="have 2 dimensions"):
        fused.info_nce(query, query, query[:, None])


@pytest.mark.skipif("tau" not in fused.OPTIONS, reason="negatives may be left out since 0.1.1")
@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_negatives_must_be_given():
    for module in (fused, peer):
        with pytest.raises(AttributeError):
            module.info_nce(clustered(5, 3), clustered(5, 3), None)
