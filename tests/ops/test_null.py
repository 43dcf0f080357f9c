"""fastcv::null, the template of an operator: every check that one gets, in its shortest form."""

import pytest
import torch

import fastcv

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def test_hand_computed_example():
    assert fastcv.ops.null(torch.tensor([1.0, -2.0, 3.5])).tolist() == [1.0, -2.0, 3.5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (15,), (16,), (17,), (3, 5, 7), (400, 401)])
def test_equals_the_reference(shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    out = fastcv.ops.null(x)
    assert out.dtype == dtype and torch.equal(out, fastcv.reference.null.null(x))
    assert out.data_ptr() != x.data_ptr() or x.numel() == 0


def test_strided_input_gives_contiguous_output():
    x = torch.arange(24.0).reshape(2, 3, 4)
    for view in (x.transpose(0, 2), x[:, ::2], x[..., 1:3], x.expand(5, 2, 3, 4)):
        out = fastcv.ops.null(view)
        assert out.is_contiguous() and torch.equal(out, view)


def test_special_values():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    assert torch.equal(fastcv.ops.null(x).view(torch.int32), x.view(torch.int32))


def test_threads_change_nothing():
    x = torch.randn(1 << 18)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fastcv.ops.null(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, x) for result in results)


def test_derivatives():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fastcv.ops.null, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: fastcv.ops.null(x) ** 2, (x,))


def test_opcheck():
    for requires_grad in (False, True):
        x = torch.randn(3, 4, requires_grad=requires_grad)
        torch.library.opcheck(torch.ops.fastcv.null.default, (x,))


def test_compile():
    x = torch.randn(5, 6).t()
    compiled = torch.compile(lambda x: fastcv.ops.null(x) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), x + 1)


def test_vmap():
    x = torch.randn(4, 5, 6)
    assert torch.equal(torch.vmap(fastcv.ops.null, in_dims=1, out_dims=1)(x), x)


def test_errors():
    with pytest.raises(TypeError, match=r"x: expected float32.*got torch.int64"):
        fastcv.ops.null(torch.arange(3))
    with pytest.raises(TypeError, match="x: expected a Tensor, got list"):
        fastcv.ops.null([1.0])
    with pytest.raises(RuntimeError, match="x: expected float32"):
        torch.ops.fastcv.null(torch.arange(3))


@pytest.mark.skipif(
    fastcv.build_info()["operators"]["null"]["cuda"] != "compiled" or not torch.cuda.is_available(),
    reason="needs a CUDA device and a build with the CUDA part",
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda(dtype):
    x = torch.randn(1000, device="cuda").to(dtype)
    assert torch.equal(fastcv.ops.null(x), x)
    assert torch.equal(fastcv.ops.null(x[::2]), x[::2])
