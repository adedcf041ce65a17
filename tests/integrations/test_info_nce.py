"""info-nce-pytorch, fused, against its own."""

from __future__ import annotations

import pytest
from oracles import randn

pytest.importorskip("info_nce")
import info_nce as peer  # noqa: E402
from conformance import assert_conforms, clustered  # noqa: E402

from contrastive_kernels.integrations import info_nce as fused  # noqa: E402

TEMPERATURES = [1.0, 0.07, 0.01]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("mode", "shape"), [("unpaired", (41, 7)), ("paired", (13, 5, 7))])
def test_negatives(mode, shape, temperature, reduction):
    options = {"temperature": temperature, "reduction": reduction, "negative_mode": mode}
    query = clustered(13, 7)
    inputs = [query, query + 0.3 * randn(13, 7, seed=1), clustered(*shape, seed=2)]
    assert_conforms(fused.InfoNCE(**options), peer.InfoNCE(**options), inputs)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("n", [1, 2, 31])
@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_in_batch(n, temperature):
    query = clustered(n, 9)
    inputs = [query, query + 0.3 * randn(n, 9, seed=1)]
    options = {"temperature": temperature}
    assert_conforms(fused.InfoNCE(**options), peer.InfoNCE(**options), inputs)


@pytest.mark.filterwarnings("ignore:.*runs unfused")
def test_what_does_not_fit_raises_the_peers_error():
    query = clustered(5, 3)
    with pytest.raises(ValueError, match="must have 3 dimensions"):
        fused.info_nce(query, query, query, negative_mode="paired")
    with pytest.raises(ValueError, match="must have 2 dimensions"):
        fused.info_nce(query, query, query[:, None])
