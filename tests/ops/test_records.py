"""The records: each file in the folder is an op, and its fields are consistent."""

from pathlib import Path

import pytest
import torch

from minimind_fast import ops
from minimind_fast.config import PRESETS, ModelConfig
from minimind_fast.ops import records
from minimind_fast.ops.cases import Draw

ROOT = Path(__file__).resolve().parents[2]
every_op = pytest.mark.parametrize("op", ops.OPS.values(), ids=lambda op: op.name)


def test_each_file_in_the_folder_is_an_op_with_a_kernel_file_of_its_name():
    names = {path.stem for path in Path(records.__path__[0]).glob("*.py")} - {"__init__"}
    assert names == set(ops.NAMES)
    assert all((ROOT / "kernels" / f"{name}.py").is_file() for name in names)


def test_pages_of_kernels_are_those_that_records_name():
    assert {op.page for op in ops.OPS.values()} - {""} == {p.stem for p in (ROOT / "docs" / "en").glob("kernel_*.md")}


@every_op
def test_a_record_names_itself_its_tensors_and_a_model_that_calls_it(op):
    called = [case for preset in PRESETS if (case := op.preset_case(preset, 2))]
    assert called
    for case in [*called, *op.cases]:
        tensors = case.tensors(Draw(torch.float32))
        assert case.op == op.name and set(op.differentiable) <= set(tensors)
        assert case.promised in (*tensors, "") and set(case.fixed) <= set(tensors)


@every_op
def test_work_grows_with_tokens_and_bytes(op):
    c = ModelConfig.preset("minimind3-moe")
    for direction in ("forward", "backward"):
        one, more, wide = (op.work(c, direction, *how) for how in ((10, 2), (20, 2), (10, 4)))
        assert one.bytes > 0 and more.bytes == 2 * one.bytes and wide.bytes == 2 * one.bytes
        assert more.flops == 2 * one.flops and wide.flops == one.flops


def test_sizes_for_the_interpreter_are_fields_of_the_config():
    for op in ops.OPS.values():
        for preset in PRESETS:
            ModelConfig.preset(preset, **op.small)
