"""Negatives of different number for each query: padded under a mask, or one run after another."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from loss_calls import inputs, ours, with_backends
from oracles import BACKENDS, DOUBLE, randn, value_and_gradients, views
from torch.utils._python_dispatch import TorchDispatchMode

import contrastive_kernels as ck
from contrastive_kernels import ops, reference
from contrastive_kernels.losses.table import CASES

MASKED = [name for name, (_, case) in CASES.items() if "negatives_mask" in case.inputs]
RAGGED = [name for name, (_, case) in CASES.items() if "negatives_per_query" in case.inputs]
OF_QUERIES = {"info_nce": {}, "eqco": {}, "rince": {}, "nce": {"num_data": 50, "Z": 7.0}}
COUNTS = torch.tensor([3, 0, 1, 5, 2, 4, 5])
MASK = torch.arange(5) < COUNTS[:, None]
parametrize_backends = pytest.mark.parametrize("backend", BACKENDS)
parametrize_losses = pytest.mark.parametrize("loss", OF_QUERIES)


def problem() -> list[torch.Tensor]:
    """Two views (7, 4), negatives of each query (7, 5, 4), and the same without padding (20, 4)."""
    query, key, negatives = views(7, 4, (7, 5, 4))
    return [query, key, negatives, negatives[MASK]]


def test_losses_with_negatives_of_each_query_are_in_the_table():
    assert {CASES[name][0].name for name in MASKED} == {*OF_QUERIES, "mnrl"}
    assert {CASES[name][0].name for name in RAGGED} == set(OF_QUERIES)


@with_backends(MASKED, interpreted=["info_nce masked margin", "nce masked", "mnrl masked"])
def test_padding_of_any_value_has_no_influence(name, backend):
    """Not on the value, nor a gradient, which is 0 for the padding itself."""
    case = CASES[name][1]
    where = list(case.inputs).index("documents" if "documents" in case.inputs else "negatives")
    given = inputs(name)
    mask = given[list(case.inputs).index("negatives_mask")]
    if "documents" in case.inputs:  # the positives, then block by block
        mask = torch.cat((torch.ones_like(mask[:, :1]), mask), 1).T.flatten()
    padded = given[where].detach().clone()
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e200], dtype=DOUBLE)
    padded[~mask] = values.repeat(int((~mask).sum()), 2)[:, : padded.shape[-1]]
    other = list(given)
    other[where] = padded.requires_grad_()
    reduction = {"reduction": "none", "backend": backend}
    wanted = value_and_gradients(ours(name, **reduction), given)
    got = value_and_gradients(ours(name, **reduction), other)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    learned = [i for i, t in enumerate(given) if t.requires_grad]
    assert (got[1 + learned.index(where)][~mask] == 0).all()


@parametrize_losses
@parametrize_backends
@pytest.mark.parametrize("options", [{}, {"normalize": False, "temperature": 1.0}], ids=str)
def test_a_row_is_that_of_a_call_with_its_negatives_alone(loss, backend, options):
    query, key, negatives, flat = problem()
    call = partial(
        getattr(ck, loss), reduction="none", backend=backend, **OF_QUERIES[loss], **options
    )
    masked = call(query, key, negatives=negatives, negatives_mask=MASK)
    ragged = call(query, key, negatives=flat, negatives_per_query=COUNTS)
    torch.testing.assert_close(masked, ragged, rtol=1e-12, atol=1e-12)
    for i, count in enumerate(COUNTS.tolist()):
        if count:
            alone = call(query[i : i + 1], key[i : i + 1], negatives=negatives[i, :count])
            torch.testing.assert_close(masked[i], alone[0], rtol=1e-11, atol=1e-12)
    if loss != "rince":  # which has lam of the positive left
        assert masked[1] == 0


@parametrize_losses
@parametrize_backends
def test_no_negatives_at_all(loss, backend):
    query, key, _, flat = problem()
    none = torch.zeros(7, dtype=torch.long)
    call = partial(getattr(ck, loss), reduction="none", backend=backend, **OF_QUERIES[loss])
    padded = partial(call, negatives=flat.new_full((7, 2, 4), torch.nan))
    masked = value_and_gradients(
        lambda q, k: padded(q, k, negatives_mask=torch.zeros(7, 2, dtype=torch.bool)), [query, key]
    )
    ragged = value_and_gradients(
        lambda q, k, n: call(q, k, negatives=n, negatives_per_query=none), [query, key, flat[:0]]
    )
    for a, b in zip(masked, ragged[:3], strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert loss == "rince" or not masked[0].any()


@parametrize_backends
@pytest.mark.parametrize("in_batch", [False, True])
def test_ids_and_biases_of_negatives(backend, in_batch):
    """Of runs one for each negative, of padded ones one for each column."""
    query, key, negatives, flat = problem()
    rows, start = torch.arange(7) % 3, 7 * in_batch
    of_flat = torch.arange(start + len(flat)) % 3
    bias = randn(start + len(flat), seed=8)
    call = partial(ck.info_nce, alpha=9.0, in_batch=in_batch, reduction="none", backend=backend)

    z = 10 * torch.einsum("nd,nmd->nm", F.normalize(query), F.normalize(negatives, dim=-1))
    z[MASK] += bias[start:]
    same = torch.zeros_like(MASK)
    same[MASK] = rows.repeat_interleave(COUNTS) == of_flat[start:]
    kept = MASK & ~same
    pos = 10 * F.cosine_similarity(query, key)
    if in_batch:
        others = 10 * F.normalize(query) @ F.normalize(key).T + bias[:7]
        pos = others.diagonal()
        z, kept = torch.cat((others, z), 1), torch.cat((rows[:, None] != of_flat[:7], kept), 1)
        kept[:, :7].fill_diagonal_(False)
    ratio = 9 / kept.sum(1).clamp(min=1).double()
    expected = torch.log1p(ratio * ((z - pos[:, None]).exp() * kept).sum(1))
    ragged = call(
        query, key, negatives=flat, negatives_per_query=COUNTS, exclude=(rows, of_flat),
        key_bias=bias,
    )  # fmt: skip
    torch.testing.assert_close(ragged, expected, rtol=1e-11, atol=1e-11)

    columns, of_columns = torch.arange(start + 5) % 3, randn(start + 5, seed=9)
    spread = torch.arange(5).repeat(7, 1)[MASK] + start
    both = [torch.cat((t[:start], t[spread])) for t in (columns, of_columns)]
    padded = call(
        query, key, negatives=negatives, negatives_mask=MASK, exclude=(rows, columns),
        key_bias=of_columns,
    )  # fmt: skip
    runs = call(
        query, key, negatives=flat, negatives_per_query=COUNTS, exclude=(rows, both[0]),
        key_bias=both[1],
    )  # fmt: skip
    torch.testing.assert_close(padded, runs, rtol=1e-12, atol=1e-12)


@parametrize_losses
@parametrize_backends
def test_statistics_count_what_counts(loss, backend):
    query, key, negatives, flat = problem()
    key[3] = -query[3]
    similarity = torch.einsum("nd,nmd->nm", F.normalize(query), F.normalize(negatives, dim=-1))
    positive = F.cosine_similarity(query, key)
    rank = ((similarity > positive[:, None]) & MASK).sum(1)
    call = partial(getattr(ck, loss), return_stats=True, backend=backend, **OF_QUERIES[loss])
    for value, stats in (
        call(query, key, negatives=negatives.masked_fill(~MASK[..., None], torch.nan),
             negatives_mask=MASK),
        call(query, key, negatives=flat, negatives_per_query=COUNTS),
    ):  # fmt: skip
        assert torch.equal(stats.rank.long(), rank) and rank.max() > 0
        close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
        close(stats.accuracy, (rank == 0).double().mean())
        close(stats.negative_similarity, similarity[MASK].mean())
        if loss == "info_nce":
            close(stats.mi_lower_bound, (COUNTS + 1).double().log().mean() - value)
            z = torch.cat((positive[:, None], similarity.masked_fill(~MASK, -torch.inf)), 1)
            close(stats.lse, (10 * z).logsumexp(1))


@parametrize_backends
def test_statistics_of_mnrl_count_what_counts(backend):
    query, positive, hard = views(7, 4, (7, 5, 4))
    documents = torch.cat((positive, hard.transpose(0, 1).flatten(0, 1)))
    value, stats = ck.mnrl(
        query, documents, negatives_mask=MASK, backend=backend, return_stats=True
    )
    kept = torch.cat((torch.ones(7, dtype=torch.bool), MASK.T.flatten()))
    similarity = F.normalize(query) @ F.normalize(documents).T
    negative = kept.repeat(7, 1)
    negative[:, :7].fill_diagonal_(False)
    rank = ((similarity > similarity[:, :7].diagonal()[:, None]) & negative).sum(1)
    assert torch.equal(stats.rank.long(), rank) and rank.max() > 0
    torch.testing.assert_close(stats.negative_similarity, similarity[negative].mean())
    bound = kept.sum().double().log() - value
    torch.testing.assert_close(stats.mi_lower_bound, bound)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "counts", [[1], [0, 70, 0, 1], [64, 65, 63, 0], [0, 0, 129, 2, 0]], ids=str
)
def test_products_of_runs(backend, normalize, counts):
    """Runs of a block of keys, one more and one less, and none at both ends."""
    numbers = torch.tensor(counts)
    x, y = randn(len(counts), 33), randn(sum(counts), 33, seed=1)

    def runs(x, y):
        return ops.row_dot(x, y, ends=numbers.cumsum(0), normalize=normalize, backend=backend)

    def dense(x, y):
        owners = torch.arange(len(counts)).repeat_interleave(numbers)
        return reference.row_dot(x[owners], y, normalize=normalize)

    for a, b in zip(
        value_and_gradients(runs, [x, y]), value_and_gradients(dense, [x, y]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


class _Largest(TorchDispatchMode):
    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else (out,)
        self.size = max([self.size, *(t.numel() for t in made if isinstance(t, torch.Tensor))])
        return out


@parametrize_losses
def test_memory_is_that_of_the_negatives(loss):
    """One query with most of them: nothing is padded, or made for pairs with other queries."""
    counts = torch.ones(500, dtype=torch.long)
    counts[7] = 3000
    query, key, flat = views(500, 3, (int(counts.sum()), 3))
    leaves = [t.requires_grad_() for t in (query, key, flat)]
    call = partial(getattr(ck, loss), **OF_QUERIES[loss])
    with _Largest() as largest:
        value = call(query, key, negatives=flat, negatives_per_query=counts)
        torch.autograd.grad(value, leaves)
    assert largest.size == flat.numel()


@parametrize_losses
def test_second_order_gradients(loss):
    query, key, negatives, flat = (t.requires_grad_() for t in problem())
    call = partial(getattr(ck, loss), temperature=1.0, backend="reference", **OF_QUERIES[loss])
    masked = partial(call, negatives_mask=MASK[:4, :3])
    assert torch.autograd.gradgradcheck(
        lambda q, k, n: masked(q, k, negatives=n), (query[:4], key[:4], negatives[:4, :3])
    )
    ragged = partial(call, negatives_per_query=COUNTS[:3])
    assert torch.autograd.gradgradcheck(
        lambda q, k, n: ragged(q, k, negatives=n), (query[:3], key[:3], flat[:4])
    )
    for backend in set(BACKENDS) - {"reference"}:
        with pytest.raises(NotImplementedError, match="second-order"):
            value = ragged(query[:3], key[:3], negatives=flat[:4], backend=backend)
            (gradient,) = torch.autograd.grad(value, flat, create_graph=True)
            gradient.sum().backward()


PASSAGES = (7, 3)  # queries, and negatives of each


def passages() -> tuple[torch.Tensor, torch.Tensor]:
    n, k = PASSAGES
    return randn(n, 4).requires_grad_(), randn(n * (1 + k), 4, seed=1).requires_grad_()


def recipe(query: torch.Tensor, grouped: torch.Tensor, everything: bool, **options):
    n, k = PASSAGES
    own = grouped.view(n, 1 + k, -1)
    negatives = own[:, 1:].flatten(0, 1) if everything else own[:, 1:]
    return ck.info_nce(
        query, own[:, 0], negatives=negatives, in_batch=everything, normalize=False,
        temperature=0.5, **options,
    )  # fmt: skip


@parametrize_backends
@pytest.mark.parametrize("everything", [True, False], ids=["all passages", "own group"])
def test_passages_in_groups(backend, everything):
    """The cross-entropy of tevatron and FlagEmbedding: of a query against all passages with the
    target i (1 + k), or against its own group."""
    n, k = PASSAGES
    query, grouped = passages()
    if everything:
        scores, target = query @ grouped.T, torch.arange(n) * (1 + k)
    else:
        scores = torch.einsum("nd,nkd->nk", query, grouped.view(n, 1 + k, -1))
        target = torch.zeros(n, dtype=torch.long)
    expected = F.cross_entropy(scores / 0.5, target)
    got = recipe(query, grouped, everything, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got, (query, grouped)), torch.autograd.grad(expected, (query, grouped)),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_compiled_counts_that_do_not_fit_raise():
    query, key, _, flat = problem()
    loss = torch.compile(ck.info_nce, fullgraph=True, backend="aot_eager")
    expected = ck.info_nce(query, key, negatives=flat, negatives_per_query=COUNTS)
    got = loss(query, key, negatives=flat, negatives_per_query=COUNTS)
    torch.testing.assert_close(got, expected)
    with pytest.raises((RuntimeError, ValueError), match=">= 0"):
        loss(query, key, negatives=flat, negatives_per_query=COUNTS + 1)


@pytest.mark.parametrize("loss", [*OF_QUERIES, "mnrl"])
def test_masks_that_do_not_fit(loss):
    query, key, negatives, flat = problem()

    def fails(error, message, given, mask, **more):
        with pytest.raises(error, match=message):
            if loss == "mnrl":
                blocks = torch.cat((key, given.transpose(0, 1).flatten(0, 1)))
                ck.mnrl(query, blocks, negatives_mask=mask)
            else:
                call = partial(getattr(ck, loss), **OF_QUERIES[loss])
                call(query, key, negatives=given, negatives_mask=mask, **more)

    fails(TypeError, "negatives_mask must be a bool tensor.*got int64", negatives, MASK.long())
    fails(TypeError, "negatives_mask must be a bool tensor.*got list", negatives, MASK.tolist())
    fails(
        ValueError, r"negatives_mask must have shape \(7, 5\), got \(7, 4\)", negatives, MASK[:, 1:]
    )
    if loss == "mnrl":
        fails(ValueError, "negatives_mask needs documents with hard", negatives[:, :0], MASK)
        return
    needs = r"negatives_mask needs negatives of shape \(N, M, D\), got "
    fails(ValueError, needs + r"\(20, 4\)", flat, MASK)
    fails(ValueError, needs + "list", [flat, flat], MASK)
    fails(ValueError, needs + "NoneType", None, MASK)
    fails(ValueError, "must not both be given", negatives, MASK, negatives_per_query=COUNTS)


@parametrize_losses
def test_counts_that_do_not_fit(loss):
    query, key, negatives, flat = problem()

    def fails(error, message, given, counts):
        with pytest.raises(error, match=message):
            call = partial(getattr(ck, loss), **OF_QUERIES[loss])
            call(query, key, negatives=given, negatives_per_query=counts)

    name = "negatives_per_query"
    fails(TypeError, f"{name} must be an integer tensor, got list", flat, COUNTS.tolist())
    fails(TypeError, f"{name} must be an integer tensor, got torch.float32", flat, COUNTS.float())
    fails(TypeError, f"{name} must be an integer tensor, got bool", flat, COUNTS.bool())
    fails(ValueError, rf"{name} must have shape \(7,\), got \(6,\)", flat, COUNTS[1:])
    fits = f"{name} must be >= 0 and sum to the 20 rows of negatives, got "
    fails(ValueError, rf"{fits}\[4, 1, 2, 6, 3, 5, 6\], which sum to 27", flat, COUNTS + 1)
    negative = torch.tensor([-1, 21, 0, 0, 0, 0, 0])
    fails(ValueError, rf"{fits}\[-1, 21, 0, 0, 0, 0, 0\]", flat, negative)
    needs = rf"{name} needs negatives of shape \(total, D\), in one tensor, got "
    fails(ValueError, needs + r"\(7, 5, 4\)", negatives, COUNTS)
    fails(ValueError, needs + "list", [flat], COUNTS)
    fails(ValueError, needs + "NoneType", None, COUNTS)
