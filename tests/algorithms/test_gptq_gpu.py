"""GPTQ's block in one launch against the loop over columns: on a GPU, else through Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

from wrapq.algorithms import columns as loop
from wrapq.algorithms.columns import gptq
from wrapq.observers.base import observe_tensor
from wrapq.quant.affine import round_to_grid
from wrapq.quant.dtypes import DTYPES
from wrapq.quant.spec import QuantSpec
from wrapq.statistics.cholesky import factorize

ON_GPU = torch.cuda.is_available()
CASES = [(40, 70, "int4", None), (128, 33, "uint4", "int"), (17, 16, "uint2", "float"), (1, 5, "int8", None)]


def check(size: int, width: int, name: str, zero_point: str | None, device: str) -> None:
    """Each point is the nearest to its column, less the errors of those before it, in float64."""
    from wrapq.algorithms.gpu.gptq_kernel import round_columns

    torch.manual_seed(size)
    dtype, lines, scale = DTYPES[name], torch.randn(size, width), torch.rand(size, width) * 0.2 + 0.1
    zero = None if zero_point is None else torch.randint(0, dtype.qmax + 1, (size, width), dtype=torch.int32)
    zero = zero if zero is None else zero + torch.rand(size, width) if zero_point == "float" else zero.float()
    upper = torch.triu(torch.randn(size, size) * 0.1)
    upper.diagonal().fill_(1)
    upper = upper.t().contiguous().t() if size > 1 else upper  # in memory as a factor that was flipped lies
    rounded, errors = lines.clone().to(device), torch.full((size, width), float("nan"), device=device)
    given = [None if t is None else t.to(device) for t in (scale, zero, upper)]
    round_columns(rounded, errors, *given, dtype)
    left, rounded, errors = lines.double(), rounded.cpu(), errors.cpu()
    for i in range(size):
        points = None if zero is None else zero[i]
        nearest = round_to_grid((left[i] / scale[i]).float(), points, dtype)
        ties = ((left[i] / scale[i] + (0 if points is None else points)) % 1 - 0.5).abs() < 1e-4
        assert torch.equal(rounded[i][~ties], nearest[~ties])
        error = left[i] - rounded[i].double() * scale[i]
        assert (error - errors[i]).abs().max() < 1e-4
        left[i + 1 :] -= upper[i, i + 1 :, None] * error


def test_a_block_in_one_launch() -> None:
    if ON_GPU:
        for case in CASES:
            check(*case, "cuda")
        return
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.algorithms.test_gptq_gpu"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_weight_solved_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = 96, 320
    mixed = torch.randn(columns, columns, device="cuda") / columns**0.5
    x = torch.randn(2000, columns, device="cuda") @ mixed * torch.rand(columns, device="cuda")
    x[:, 7] = 0
    weight, hessian = torch.randn(rows, columns, device="cuda"), x.t() @ x
    factor = factorize(hessian, 0.01, True)
    for spec in ("int4:g32", "int3:g32:signed", "uint3:channel:asym", "int4:g32:asym:zero=float", "fp4_e2m1:g32"):
        ranges = observe_tensor(weight, QuantSpec.parse(spec), "w")
        (fast,) = gptq(weight, [ranges], factor)
        assert torch.equal(gptq(weight, [ranges], factor)[0].codes, fast.codes), "the same bits each time"
        with monkeypatch.context() as patch:
            patch.setattr(loop, "_in_one_launch", lambda *_: None)
            (slow,) = gptq(weight, [ranges], factor)
        lost = []
        for codes in (fast.codes, slow.codes, ranges.quantize(weight)):
            error = weight - ranges.dequantize(codes, torch.float32)
            lost.append(((error @ hessian) * error).sum().item())
        # a tie that falls the other way moves what follows, but loses no more; rounding to nearest loses much more
        assert lost[0] == pytest.approx(lost[1], rel=0.02) and lost[0] < 0.8 * lost[2]


if __name__ == "__main__":
    for case in CASES:
        check(*case, "cpu")
