"""max_sim on every backend against loops over queries and documents."""

from __future__ import annotations

from functools import partial

import oracles
import pytest
import torch
import torch.nn.functional as F
from allocations import peak_of
from oracles import BACKENDS, DOUBLE, randn, value_and_gradients
from torch.library import opcheck

import contrastive_kernels as ck

# queries, their tokens, documents, their tokens, features
SIZES = [(1, 1, 1, 1, 2), (3, 5, 4, 7, 3), (5, 33, 2, 131, 33), (3, 100, 3, 40, 64)]
SMALL = SIZES[:3]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
parametrize_backends = pytest.mark.parametrize("backend", BACKENDS)
with_sizes = pytest.mark.parametrize(
    ("backend", "sizes"),
    [(b, s) for b in BACKENDS for s in (SMALL if oracles.interpreted(b) else SIZES)],
)
with_options = pytest.mark.parametrize(
    "options",
    [{}, {"normalize": True}, {"temperature": 0.3}, {"temperature": 0.3, "normalize": True}],
    ids=["largest", "unit", "smooth", "smooth unit"],
)


def score(query, document, temperature=None, normalize=False):
    """Of the tokens of one query and of one document."""
    if len(query) == 0:
        return query.new_zeros(())
    if len(document) == 0:
        return query.new_full((), -torch.inf)
    if normalize:
        query, document = F.normalize(query, dim=-1), F.normalize(document, dim=-1)
    z = query @ document.T
    if temperature is None:
        return z.max(1).values.sum()
    return temperature * (z / temperature).logsumexp(1).sum()


def promoted(*tensors):
    return [t if t.dtype == DOUBLE else t.float() for t in tensors]


def definition(queries, documents, query_mask=None, document_mask=None, **options):
    """Loops over queries and documents."""
    queries, documents = promoted(queries, documents)

    def tokens(t, mask, *at):
        return t[at] if mask is None else t[at][mask[at]]

    rows = []
    for n in range(len(queries)):
        query = tokens(queries, query_mask, n)
        of = [(m,) for m in range(len(documents))]
        if documents.dim() == 4:
            of = [(n, k) for k in range(documents.shape[1])]
        rows.append(
            torch.stack([score(query, tokens(documents, document_mask, *m), **options) for m in of])
        )
    return torch.stack(rows)


def tokens(sizes, dtype=DOUBLE):
    n, query_length, m, document_length, d = sizes
    return [
        randn(n, query_length, d, dtype=dtype),
        randn(m, document_length, d, seed=1, dtype=dtype),
    ]


def some(*shape, seed=5):
    return torch.rand(shape, generator=oracles.generator(seed)) < 0.6


@with_options
@with_sizes
def test_against_loops(backend, sizes, options):
    found, expected = (partial(f, **options) for f in (ck.max_sim, definition))
    found = partial(found, backend=backend)
    oracles.assert_equal_in_double(found, expected, tokens(sizes))
    for dtype in DTYPES[:1] if oracles.interpreted(backend) else DTYPES:
        oracles.assert_within_budget(found, expected, tokens(sizes, dtype))


@with_options
@parametrize_backends
def test_what_does_not_count(backend, options):
    """Whatever it is, it changes nothing and gets no gradient."""
    queries, documents = tokens((4, 6, 5, 9, 8))
    masks = some(4, 6), some(5, 9, seed=6)
    masks[1][:, 2] = True  # of every document something counts
    masks[0][1] = False
    dirty = [
        t.masked_fill(~m[..., None], torch.nan)
        for t, m in zip((queries, documents), masks, strict=True)
    ]
    found = partial(ck.max_sim, query_mask=masks[0], document_mask=masks[1], backend=backend)
    expected = partial(definition, query_mask=masks[0], document_mask=masks[1], **options)
    oracles.assert_equal_in_double(partial(found, **options), expected, [queries, documents])
    for clean, other in zip(
        value_and_gradients(partial(found, **options), [queries, documents]),
        value_and_gradients(partial(found, **options), dirty),
        strict=True,
    ):
        assert torch.equal(clean, other)


@with_options
@parametrize_backends
def test_ragged_tokens(backend, options):
    lengths = torch.tensor([3, 0, 7, 1]), torch.tensor([2, 5, 1, 11, 4])
    queries, documents = randn(11, 8), randn(23, 8, seed=1)

    def expected(queries, documents):
        queries, documents = promoted(queries, documents)
        parts = [t.split(n.tolist()) for t, n in zip((queries, documents), lengths, strict=True)]
        return torch.stack([torch.stack([score(q, d, **options) for d in parts[1]])
                            for q in parts[0]])  # fmt: skip

    found = partial(
        ck.max_sim,
        query_lengths=lengths[0],
        document_lengths=lengths[1],
        backend=backend,
        **options,
    )
    oracles.assert_equal_in_double(found, expected, [queries, documents])


@with_options
@parametrize_backends
def test_documents_of_each_query(backend, options):
    queries, documents = randn(3, 5, 8), randn(3, 4, 6, 8, seed=1)
    masks = {"query_mask": some(3, 5), "document_mask": some(3, 4, 6, seed=6)}
    masks["document_mask"][..., 1] = True
    for given in ({}, masks):
        oracles.assert_equal_in_double(
            partial(ck.max_sim, backend=backend, **given, **options),
            partial(definition, **given, **options),
            [queries, documents],
        )


@pytest.mark.parametrize("backend", [b for b in BACKENDS if not oracles.interpreted(b)])
def test_long_queries_and_strides(backend):
    """More tokens than a block of rows, in tensors of any strides."""
    queries, documents = (
        randn(16, 300, 2).permute(2, 1, 0),
        randn(70, 16, 3, seed=1).transpose(0, 2),
    )
    documents = documents.transpose(1, 2)
    for options in ({}, {"temperature": 0.5, "normalize": True}):
        oracles.assert_equal_in_double(
            partial(ck.max_sim, backend=backend, **options),
            partial(definition, **options),
            [queries, documents],
        )


@parametrize_backends
def test_the_first_of_equal_tokens_wins(backend):
    queries, documents = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    documents = documents[:, [0, 1, 0, 2, 1, 2, 2]]
    _, _, gradient = value_and_gradients(partial(ck.max_sim, backend=backend), [queries, documents])
    assert not gradient[:, [2, 4, 5, 6]].any() and gradient[:, [0, 1, 3]].any(-1).sum() > 2


@parametrize_backends
def test_sets_without_tokens(backend):
    queries, documents = tokens((2, 3, 3, 4, 5))
    query_mask, document_mask = torch.ones(2, 3).bool(), torch.ones(3, 4).bool()
    query_mask[1] = document_mask[2] = False
    for options in ({}, {"temperature": 0.3}):
        run = partial(
            ck.max_sim, query_mask=query_mask, document_mask=document_mask, backend=backend
        )
        value, of_queries, of_documents = value_and_gradients(
            partial(run, **options), [queries, documents]
        )
        assert (value == -torch.inf).tolist() == [[False, False, True], [False] * 3]
        assert not value[1].any() and not of_queries[1].any() and not of_documents[2].any()
        assert of_queries[0].isfinite().all() and of_documents.isfinite().all()
    value = ck.max_sim(
        queries, documents[0, :0], document_lengths=torch.tensor([0, 0]), backend=backend
    )
    assert (value == -torch.inf).all() and value.shape == (2, 2)


@parametrize_backends
def test_nan_is_never_hidden(backend):
    queries, documents = tokens((2, 3, 3, 4, 5))
    queries[0, 1, 2] = documents[1, 3, 0] = torch.nan
    for options in ({}, {"temperature": 0.3}, {"normalize": True}):
        value = ck.max_sim(queries, documents, backend=backend, **options)
        assert value.isnan().tolist() == [[True] * 3, [False, True, False]]


@parametrize_backends
def test_gradients_where_they_are_needed(backend):
    queries, documents = (t.requires_grad_() for t in tokens((2, 3, 3, 4, 5)))
    run = partial(ck.max_sim, normalize=True, backend=backend)
    both = torch.autograd.grad(run(queries, documents).sum(), (queries, documents))
    of_queries = torch.autograd.grad(run(queries, documents.detach()).sum(), queries)
    of_documents = torch.autograd.grad(run(queries.detach(), documents).sum(), documents)
    assert all(map(torch.equal, both, (*of_queries, *of_documents)))


@parametrize_backends
def test_transforms_and_second_order(backend):
    queries, documents = tokens((3, 2, 3, 4, 5))
    run = partial(ck.max_sim, backend=backend)
    wanted = definition(queries, documents)
    together = torch.vmap(run)(torch.stack([queries, 2 * queries]), torch.stack([documents] * 2))
    torch.testing.assert_close(together, torch.stack([wanted, 2 * wanted]))
    gradient = torch.func.grad(lambda q: run(q, documents).square().sum())(queries)
    queries.requires_grad_()
    first = torch.autograd.grad(run(queries, documents).square().sum(), queries, create_graph=True)
    torch.testing.assert_close(gradient, first[0].detach())
    if backend == "reference":
        return first[0].sum().backward()
    with pytest.raises(NotImplementedError, match="second-order"):
        first[0].sum().backward()


def test_forward_mode_is_the_reference():
    queries, documents = tokens((3, 2, 3, 4, 5))
    _, tangent = torch.func.jvp(lambda q: ck.max_sim(q, documents), (queries,), (queries,))
    torch.testing.assert_close(tangent, definition(queries, documents))
    if "cpu" in BACKENDS:
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(
                lambda q: ck.max_sim(q, documents, backend="cpu"), (queries,), (queries,)
            )


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the C++ engine")
class TestEngine:
    @pytest.mark.parametrize("temperature", [0.0, 0.3])
    def test_registration(self, temperature):
        x, y = randn(5, 4).requires_grad_(), randn(6, 4, seed=1).requires_grad_()
        ends, kept = (torch.tensor([2, 5]), torch.tensor([1, 3, 6])), torch.arange(6) != 4
        operator = torch.ops.contrastive_kernels.max_sim_cpu
        opcheck(operator, (x, y, *ends, None, kept, 0, temperature, True, False))

    def test_compiled(self):
        queries, documents = (t.requires_grad_() for t in tokens((3, 2, 3, 4, 5)))
        run = torch.compile(ck.max_sim, fullgraph=True, dynamic=True, backend="aot_eager")
        for sizes in ((3, 2, 3, 4, 5), (4, 3, 2, 5, 6)):
            given = tokens(sizes)
            for a, b in zip(
                value_and_gradients(run, given), value_and_gradients(definition, given), strict=True
            ):
                torch.testing.assert_close(a, b)

    def test_autocast_changes_nothing(self):
        given = tokens((3, 2, 3, 4, 5), torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            inside = ck.max_sim(*given)
        assert torch.equal(inside, ck.max_sim(*given))

    def test_any_number_of_threads(self):
        given = tokens((20, 32, 30, 50, 32), torch.float32)
        before = torch.get_num_threads()
        found = []
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                found.append(value_and_gradients(ck.max_sim, given))
        finally:
            torch.set_num_threads(before)
        assert all(map(torch.equal, *found))

    def test_products_are_not_stored(self):
        queries, documents = (
            t.requires_grad_() for t in tokens((32, 32, 64, 180, 8), torch.float32)
        )

        def step(**options):
            loss = ck.max_sim(queries, documents, **options).sum()
            return torch.autograd.grad(loss, (queries, documents))

        products = 32 * 32 * 64 * 180 * 4
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            assert peak_of(step) < products / 30
            assert peak_of(partial(step, temperature=0.1)) < products / 30
        finally:
            torch.set_num_threads(before)

    def test_bad_operands(self):
        x, y, ends = randn(5, 4), randn(6, 4), torch.tensor([2, 5])
        operator = torch.ops.contrastive_kernels.max_sim_cpu
        with pytest.raises(ValueError, match="must have shape"):
            operator(x, y[:, :3], ends, ends, None, None, 0, 0.0, False, False)
        with pytest.raises(ValueError, match="6 in all"):
            operator(x, y, ends, ends, None, None, 0, 0.0, False, False)
        with pytest.raises(TypeError, match="float64 or neither"):
            operator(x, y.float(), ends, ends, None, None, 0, 0.0, False, False)
        with pytest.raises(ValueError, match="y_ends must have 4 entries"):
            operator(x, y, ends, torch.tensor([3, 6]), None, None, 2, 0.0, False, False)


X, Y = randn(2, 3, 4), randn(5, 6, 4, seed=1)
ERRORS = [
    (ValueError, r"queries must have shape \(N, M, D\), got \(3, 4\)", (X[0], Y), {}),
    (ValueError, "the same number of features D", (X, Y[..., :3]), {}),
    (ValueError, "documents must not be empty", (X, Y[:0]), {}),
    (ValueError, "documents must not be empty", (X, Y[:, :0]), {}),
    (ValueError, "must have N = 2 as queries have", (X, Y[None]), {}),
    (TypeError, "query_mask must be a bool tensor, True where a token", (X, Y, X[..., 0]), {}),
    (ValueError, r"document_mask must have shape \(5, 6\)", (X, Y, None, torch.ones(5).bool()), {}),
    (ValueError, "query_lengths must be >= 0 and sum to the 3 rows of queries", (X[0], Y),
     {"query_lengths": torch.tensor([1, 1])}),
    (ValueError, "document_mask and document_lengths must not both", (X, Y, None, Y[..., 0] > 0),
     {"document_lengths": torch.tensor([6])}),
    (ValueError, r"query_lengths must be a tensor of shape \(N,\), got list", (X[0], Y),
     {"query_lengths": [3]}),
    (ValueError, "temperature must be a finite number > 0", (X, Y), {"temperature": 0.0}),
    (ValueError, "backend must be", (X, Y), {"backend": "fast"}),
    (TypeError, "both be float64 or neither", (X, Y.float()), {}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "given", "options"), ERRORS)
def test_errors(error, message, given, options):
    with pytest.raises(error, match=message):
        ck.max_sim(*given, **options)
