"""What is computed from a pack's bounds, and that it is computed once a batch."""

import pytest
import torch

import minimind_fast as mm
from minimind_fast.data.batches import Batch
from minimind_fast.ops.attention import use
from minimind_fast.ops.documents import Documents, documents_of, packed_positions, run

SHAPE = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=512)


def make(preset="minimind3", dtype=torch.bfloat16):
    torch.manual_seed(0)
    return mm.MiniMind(mm.ModelConfig.preset(preset, **SHAPE)).to(dtype).eval()


def bounds(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def batch_of(*lengths):
    ids = torch.arange(3, 3 + sum(lengths))
    return Batch(ids, ids + 1, bounds(*lengths), max(lengths), len(ids), len(lengths))


def test_packed_positions():
    assert packed_positions(bounds(3, 0, 2), 5).tolist() == [0, 1, 2, 0, 1]


def test_filler_is_documents_no_longer_than_a_real_one():
    made = Documents.of(bounds(3, 2), 5, torch.float32, size=16)
    assert made.cu_seqlens.tolist() == [0, 3, 5, 8, 11, 14, 16]
    assert made.positions.tolist() == packed_positions(made.cu_seqlens, 16).tolist()
    assert (made.max_seqlen, made.tokens, made.filler, made.cu_seqlens.dtype) == (3, 5, 11, torch.int32)
    assert sum(n * length for n, length in made.rectangles.shapes) >= 16


def test_filler_of_a_fixed_number_of_bounds():
    made = Documents.of(bounds(3, 2), 5, torch.float32).padded(16, bounds=6, longest=8)
    assert made.cu_seqlens.tolist() == [0, 3, 5, 13, 16, 16]
    assert made.positions.tolist() == packed_positions(made.cu_seqlens, 16).tolist()


def test_rows_are_documents_of_one_length():
    made = Documents.of_rows(2, 3, torch.device("cpu"), torch.float32)
    assert made.cu_seqlens.tolist() == [0, 3, 6] and made.positions.tolist() == [0, 1, 2] * 2 and made.max_seqlen == 3


def test_what_is_filled_is_cut_again():
    made = Documents.of(bounds(3, 2), 5, torch.float32, size=16)
    ids = torch.arange(5)
    assert made.fill_ids(ids).tolist() == ([0, 1, 2, 3, 4] * 4)[:16]
    filled = made.fill(torch.ones(5, 2), 7)
    assert filled.shape == (16, 2) and (filled[5:] == 7).all()
    out = made.cut(mm.model.ModelOutput(logprobs=filled, aux_loss=torch.tensor(1.0)))
    assert out.logprobs.shape == (5, 2) and out.aux_loss == 1 and out.logits is None


def test_rectangles_are_made_only_for_the_backend_that_asks_for_them():
    with use("eager"):
        assert Documents.of(bounds(3, 2), 5, torch.float32).rectangles is None
    assert Documents.of(bounds(3, 2), 5, torch.float32).rectangles is not None


def test_two_passes_over_a_batch_share_its_documents():
    model, batch = make(), batch_of(3, 4)
    first = documents_of(model, batch)
    assert first.filler == 9 and documents_of(make(), batch) is first
    assert documents_of(make("minimind3-moe"), batch).filler == 0  # a teacher of another kind
    assert documents_of(model, batch.to("cpu")) is not first
    with use("eager"):
        assert documents_of(model, batch).backend == "eager"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["minimind3", "minimind3-moe"])
def test_run_gives_what_the_model_gives(preset, dtype):
    model, batch = make(preset, dtype), batch_of(3, 4, 20)
    got = run(model, batch, targets=batch.targets, return_hidden=True)
    want = model(batch.input_ids, batch.targets, batch.cu_seqlens, return_hidden=True)
    torch.testing.assert_close(got.logprobs, want.logprobs)
    torch.testing.assert_close(got.hidden, want.hidden)


def test_rows_run_as_they_are():
    model = make()
    ids = torch.arange(3, 13).view(2, 5)
    batch = Batch(ids, ids, None, 5, 10, 2)
    assert torch.equal(run(model, batch, targets=ids).logprobs, model(ids, targets=ids).logprobs)
