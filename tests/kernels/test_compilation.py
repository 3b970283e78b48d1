"""Triton's kernels compile for cards that are not here, without spills and with tensor cores."""

import pytest

from benchmarks import compilation
from benchmarks.compilation import Compiled, compile_all, objections, operations


def refused(results: list[Compiled]) -> list[str]:
    return [f"{compilation.line(c)}: {why}" for c in results for why in objections(c)]


@pytest.mark.parametrize("operation", operations())
def test_each_kernel_compiles_for_an_h100(operation: str):
    results = list(compile_all([operation], ["bf16"], ["sm_90"], once=True))
    assert results
    assert refused(results) == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", compilation.ARCHITECTURES)
@pytest.mark.parametrize("operation", operations())
def test_every_shipped_configuration_compiles(operation: str, architecture: str):
    assert refused(list(compile_all([operation], ["bf16", "fp16", "fp32"], [architecture]))) == []


GOOD = Compiled("o", "c", "k", "bf16", "sm_80", "m32", 4, 168, 0, 1024, "mma.sync", 4, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": 2}, "2 spills"),
        ({"registers": 169}, "169 registers, 168 at most"),
        ({"shared": 200_000}, "200000 bytes of shared memory, 166912 fit"),
        ({"matrix_instruction": "-"}, "products without tensor cores"),
        ({"wide_loads": 0}, "no 128-bit loads"),
    ],
)
def test_what_is_not_as_it_must_be_is_named(change: dict, message: str):
    assert objections(GOOD) == []
    assert objections(Compiled(**{**GOOD.__dict__, **change})) == [message]
