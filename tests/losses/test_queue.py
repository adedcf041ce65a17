"""MoCo's queue and the memory bank: order, wrap-around, state, and safety of in-place writes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles import DOUBLE, generator, randn

import contrastive_kernels as ck


def numbered(start: int, stop: int, dim: int = 2, dtype=torch.float32):
    """Features that carry their number."""
    return torch.arange(start, stop, dtype=dtype)[:, None].expand(-1, dim)


@pytest.mark.parametrize("batches", [(3,) * 4, (5,) * 3, (10, 1), (4, 13, 2), (23,), (1,) * 12])
def test_the_queue_holds_the_last_features(batches):
    size = 5
    queue = ck.FeatureQueue(size, 2, generator=generator())
    start = queue.negatives.clone()
    seen = 0
    for count in batches:
        queue.enqueue(numbered(seen, seen + count))
        seen += count
        expected = start.clone()
        for number in range(seen):
            expected[number % size] = number
        assert torch.equal(queue.negatives, expected)
        assert queue.filled == min(seen, size)


def test_the_queue_starts_with_random_unit_vectors():
    queue = ck.FeatureQueue(7, 5, generator=generator(3))
    torch.testing.assert_close(queue.negatives.norm(dim=1), torch.ones(7))
    assert torch.equal(queue.negatives, ck.FeatureQueue(7, 5, generator=generator(3)).negatives)
    assert queue.filled == 0
    assert repr(queue) == "FeatureQueue(size=7, dim=5)"


def test_the_queue_starts_anew():
    queue = ck.FeatureQueue(7, 5, device="meta")
    assert queue.negatives.is_meta
    queue.to_empty(device="cpu")
    for buffer in queue.buffers():
        buffer.fill_(3)
    queue.reset_parameters(generator(3))
    again = ck.FeatureQueue(7, 5, generator=generator(3))
    assert torch.equal(queue.negatives, again.negatives)
    assert (queue.position, queue.filled) == (0, 0)
    names = {"features", "position", "seen", "rows"}
    assert dict(queue.named_buffers(recurse=False)).keys() == names
    assert queue.state_dict().keys() == names


def test_the_queue_is_not_copied():
    queue = ck.FeatureQueue(8, 2)
    storage = queue.negatives.data_ptr()
    for _ in range(3):
        queue.enqueue(torch.randn(3, 2))
        assert queue.negatives.data_ptr() == storage


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_queue_follows_the_dtype(dtype):
    queue = ck.FeatureQueue(4, 2)
    queue.enqueue(numbered(0, 3))
    queue.enqueue(numbered(3, 5, dtype=dtype))
    assert queue.negatives.dtype == dtype
    assert queue.negatives[:, 0].tolist() == [4, 1, 2, 3]


def test_the_queue_resumes_from_its_state():
    queue = ck.FeatureQueue(5, 2)
    queue.enqueue(numbered(0, 7))
    resumed = ck.FeatureQueue(5, 2)
    resumed.load_state_dict(queue.state_dict())
    for each in (queue, resumed):
        each.enqueue(numbered(7, 9))
    assert torch.equal(resumed.negatives, queue.negatives)
    assert resumed.filled == 5


def test_the_queue_takes_live_features_without_a_graph():
    queue = ck.FeatureQueue(4, 2)
    queue.enqueue(torch.randn(3, 2, requires_grad=True) * 2)
    assert not queue.negatives.requires_grad


def test_enqueue_before_backward_raises():
    """On a path whose backward reads the negatives again, PyTorch notices the write."""
    queue = ck.FeatureQueue(6, 5)
    query = randn(3, 5, dtype=torch.float32).requires_grad_()
    options = {"backend": "reference", "normalize": False}  # which saves the negatives themselves
    loss = ck.info_nce(query, query.detach(), negatives=queue.negatives, **options)
    queue.enqueue(query)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_enqueue_before_backward_is_never_silently_wrong():
    queue = ck.FeatureQueue(6, 5)
    query = randn(3, 5, dtype=torch.float32).requires_grad_()
    key = randn(3, 5, seed=1, dtype=torch.float32)
    (right,) = torch.autograd.grad(ck.info_nce(query, key, negatives=queue.negatives), query)
    for learned_too in (False, True):
        leaf = key.clone().requires_grad_(learned_too)
        loss = ck.info_nce(query, leaf, negatives=queue.negatives, in_batch=False)
        old = queue.negatives.clone()
        queue.enqueue(key)
        try:
            (gradient,) = torch.autograd.grad(loss, query)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            torch.testing.assert_close(gradient, right)
        queue.features.copy_(old)


def test_the_queue_works_under_compile():
    queue = ck.FeatureQueue(5, 2)
    eager = ck.FeatureQueue(5, 2)
    eager.load_state_dict(queue.state_dict())
    step = torch.compile(queue.enqueue, fullgraph=True, dynamic=True, backend="aot_eager")
    for start, stop in ((0, 3), (3, 7), (7, 9)):
        step(numbered(start, stop))
        eager.enqueue(numbered(start, stop))
    assert torch.equal(queue.negatives, eager.negatives)


@pytest.mark.parametrize(
    "features, message",
    [
        (torch.randn(3, 4), r"features must have shape \(N, 2\), got \(3, 4\)"),
        (torch.randn(0, 2), "features must not be empty"),
        (torch.randn(3), "features must have shape"),
    ],
)
def test_queue_bad_input(features, message):
    with pytest.raises(ValueError, match=message):
        ck.FeatureQueue(4, 2).enqueue(features)


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="the number of rows must be at least 1, got 0"):
        ck.FeatureQueue(0, 2)
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        ck.MemoryBank(3, 0)


def test_bank_mixes_and_normalises():
    bank = ck.MemoryBank(6, 3, momentum=0.25, generator=generator(), dtype=torch.float64)
    before = bank.features.clone()
    indices = torch.tensor([4, 0, 3])
    features = randn(3, 3)
    bank.update(indices, features)
    expected = before.clone()
    for index, feature in zip(indices, F.normalize(features), strict=True):
        expected[index] = F.normalize(0.25 * before[index] + 0.75 * feature, dim=0)
    torch.testing.assert_close(bank.features, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(bank.lookup(indices), bank.features[indices])
    assert repr(bank) == "MemoryBank(num_data=6, dim=3, momentum=0.25)"


def test_bank_takes_the_last_of_a_sample_that_comes_twice():
    bank = ck.MemoryBank(6, 3, generator=generator())
    other = copy.deepcopy(bank)
    features = randn(5, 3, dtype=torch.float32)
    bank.update(torch.tensor([4, 1, 4, 0, 4]), features)
    other.update(torch.tensor([1, 0, 4]), features[[1, 3, 4]])
    assert torch.equal(bank.features, other.features)


def test_bank_has_no_graph():
    bank = ck.MemoryBank(6, 3)
    bank.update(torch.tensor([1]), torch.ones(1, 3, requires_grad=True))
    assert not bank.features.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.5, 0.99, 0.999])
def test_bank_moves_at_any_momentum_and_dtype(dtype, momentum):
    """Beside the recursion in float64: in bfloat16 it would stand still from 0.99 on."""
    features = F.normalize(randn(9, 32, seed=1)).to(dtype)
    bank = ck.MemoryBank(9, 32, momentum=momentum, generator=generator(), dtype=dtype)
    assert bank.features.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)
    expected, goal = bank.features.clone().double(), F.normalize(features.double())
    for _ in range(round(3 / (1 - momentum))):
        bank.update(torch.arange(9), features)
        expected = F.normalize(momentum * expected + (1 - momentum) * goal)
    torch.testing.assert_close(bank.features.double(), expected, rtol=0, atol=1e-4)
    assert bank.features.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)


def first_enqueue(half: bool):
    rows = randn(2, 3, dtype=torch.bfloat16 if half else torch.float32)
    return ck.FeatureQueue(8, 3), lambda queue: queue.enqueue(rows)


def first_update(double: bool):
    rows = randn(2, 3, dtype=DOUBLE if double else torch.float32)
    return ck.MemoryBank(8, 3), lambda bank: bank.update(torch.tensor([0, 1]), rows)


def first_loss(double: bool):
    rows = randn(4, 3, dtype=DOUBLE if double else torch.float32)
    return ck.NCE(num_data=100), lambda loss: loss(rows, rows, rows)


@pytest.mark.parametrize("make", [first_enqueue, first_update, first_loss])
@pytest.mark.parametrize("other_dtype", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_buffers_are_filled_in_place_in_whatever_mode(make, other_dtype, mode):
    module, use = make(other_dtype)
    before = dict(module.named_buffers())
    with mode():
        use(module)
    after = dict(module.named_buffers())
    assert all(after[name] is buffer for name, buffer in before.items())
    assert not any(buffer.is_inference() for buffer in after.values())
    use(module)
    module.load_state_dict(copy.deepcopy(module.state_dict()))
    use(module)


def test_bank_draws_by_generator():
    bank = ck.MemoryBank(50, 3)
    shared = bank.sample(7, generator=generator(1))
    assert torch.equal(shared, bank.sample(7, generator=generator(1)))
    assert bank.sample(4, 7).shape == (4, 7, 3)
    drawn = torch.cat([bank.sample(500, generator=generator(2))])
    assert len({tuple(row) for row in drawn.tolist()}) == 50


def test_bank_resumes_from_its_state():
    bank = ck.MemoryBank(6, 3)
    bank.update(torch.tensor([2]), torch.ones(1, 3))
    resumed = ck.MemoryBank(6, 3)
    resumed.load_state_dict(bank.state_dict())
    assert torch.equal(resumed.features, bank.features)


def test_bank_feeds_nce_per_row():
    bank = ck.MemoryBank(20, 5)
    query = torch.randn(4, 5, requires_grad=True)
    indices = torch.arange(4)
    loss = ck.nce(query, bank.lookup(indices), bank.sample(4, 6), num_data=20)
    loss.backward()
    bank.update(indices, query)
    assert query.grad.isfinite().all()


def test_bank_bad_input():
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\], got 1.5"):
        ck.MemoryBank(6, 3, momentum=1.5)
    bank = ck.MemoryBank(6, 3)
    with pytest.raises(ValueError, match=r"features must have shape \(N, 3\)"):
        bank.update(torch.tensor([1]), torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"indices must have shape \(1,\), got \(2,\)"):
        bank.update(torch.tensor([1, 2]), torch.ones(1, 3))
    with pytest.raises(TypeError, match="indices must be an integer tensor"):
        bank.update(torch.tensor([1.0]), torch.ones(1, 3))
