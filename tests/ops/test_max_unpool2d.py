"""max_unpool2d: by hand, against torch and the reference, winners, derivatives, ONNX, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from fastcv import reference
from fastcv.ops import PooledIndices, _pooling, max_pool2d, max_unpool2d
from fastcv.ops._pooling import window

FORMATS = (torch.contiguous_format, torch.channels_last)
TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
WINDOWS = [(2, 2, 0), (2, 2, 1), (3, 2, 1), (3, 1, 1), (3, 3, 0), ((2, 3), (3, 2), 0), (5, 4, 2), ((1, 2), (1, 5), 0)]
SHAPES = [(2, 3, 9, 8), (1, 16, 14, 14), (1, 37, 8, 40)]


@pytest.fixture(autouse=True)
def own_kernels(monkeypatch):
    """Small maps would go to torch's (tests/ops/test_pooling_small_maps.py)."""
    monkeypatch.setattr(_pooling, "_MOST_BELOW", 0)


def normal(shape, dtype=torch.float32, memory_format=torch.contiguous_format, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=memory_format)


def pooled(x, w):
    return max_pool2d(x, *w, return_indices=True, indices="compact")


def test_by_hand():
    x = torch.tensor([[1.0, 2, 6, 3], [3, 5, 2, 1], [1, 2, 2, 1], [7, 3, 4, 8]])[None, None]
    values = torch.tensor([[1.0, 2], [3, 4]])[None, None]
    expected = [[0, 0, 2, 0], [0, 1, 0, 0], [0, 0, 0, 0], [3, 0, 0, 4]]
    assert max_unpool2d(values, pooled(x, (2,))[1])[0, 0].tolist() == expected
    indices = max_pool2d(x, 2, return_indices=True)[1]
    assert max_unpool2d(values, indices, 2)[0, 0].tolist() == expected


def test_last_window_wins_and_alone_gets_the_gradient():
    x = torch.tensor([[0.0, 0, 0], [0, 9, 0], [0, 0, 0]])[None, None]
    for indices in (max_pool2d(x, 2, 1, return_indices=True)[1], pooled(x, (2, 1))[1]):
        values = torch.tensor([[1.0, 2], [3, 4]])[None, None].requires_grad_()
        out = max_unpool2d(values, indices, 2, 1)
        assert out[0, 0].tolist() == [[0, 0, 0], [0, 4, 0], [0, 0, 0]]
        out.sum().backward()
        assert values.grad[0, 0].tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("w", WINDOWS, ids=str)
def test_reference(w, dtype, memory_format):
    for shape in SHAPES:
        x = normal(shape, dtype, memory_format)
        _, compact = pooled(x, w)
        values = normal(compact.positions.shape, dtype, memory_format, seed=1)
        numbers = window(*w)
        for sum in (False, True):
            expected = reference.max_pool2d.max_unpool2d(values.double(), compact.flat(), *shape[2:], *numbers, sum)
            gathered = reference.max_pool2d.max_unpool2d_backward(x, compact.flat(), *numbers, sum)
            for indices in (compact.positions, compact.flat()):
                out = torch.ops.fastcv.max_unpool2d(values, indices, *shape[2:], *numbers, sum)
                tolerance = 4 * torch.finfo(dtype).eps
                torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
                assert out.is_contiguous(memory_format=memory_format)
                back = torch.ops.fastcv.max_unpool2d_backward(x, indices, *numbers, sum)
                assert torch.equal(back, gathered) and back.is_contiguous(memory_format=memory_format)
        assert torch.equal(max_unpool2d(values, compact), max_unpool2d(values, compact.flat(), *w, output_size=shape))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", TYPES)
def test_indices_anywhere(dtype, memory_format):
    """Indices that no pooling gave: any pixel, also several times."""
    generator = torch.Generator().manual_seed(0)
    values = normal((2, 5, 6, 7), dtype, memory_format)
    indices = torch.randint(12 * 14, values.shape, generator=generator).contiguous(memory_format=memory_format)
    w = window(2, 2, 0)
    for sum in (False, True):
        expected = reference.max_pool2d.max_unpool2d(values.double(), indices, 12, 14, *w, sum)
        out = torch.ops.fastcv.max_unpool2d(values, indices, 12, 14, *w, sum)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)
        grad = normal(out.shape, dtype, memory_format, seed=2)
        assert torch.equal(
            torch.ops.fastcv.max_unpool2d_backward(grad, indices, *w, sum),
            reference.max_pool2d.max_unpool2d_backward(grad, indices, *w, sum),
        )


def test_like_torch():
    x = normal((2, 3, 11, 13))
    values, indices = F.max_pool2d(x, 2, return_indices=True)
    for size in ((11, 13), [2, 3, 11, 13], x.shape):
        assert torch.equal(
            max_unpool2d(values, indices, 2, output_size=size), F.max_unpool2d(values, indices, 2, output_size=size)
        )
    single = max_unpool2d(values[0], indices[0], 2, output_size=(11, 13))
    assert torch.equal(single, F.max_unpool2d(values[0], indices[0], 2, output_size=(11, 13)))
    even = F.max_pool2d(x[..., :10, :12], (2, 3), return_indices=True)
    assert torch.equal(max_unpool2d(*even, (2, 3)), F.max_unpool2d(*even, (2, 3)))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("w", [WINDOWS[i] for i in (0, 2, 3)], ids=str)
def test_derivatives(w, memory_format):
    x = normal((2, 3, 6, 7), torch.float64, memory_format)
    _, compact = pooled(x, w)
    values = normal(compact.positions.shape, torch.float64, memory_format, seed=1).requires_grad_()
    for indices in (compact, compact.flat()):

        def f(values, indices=indices):
            return max_unpool2d(values, indices, *w, output_size=x.shape)

        assert torch.autograd.gradcheck(f, values, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, values)
    x.requires_grad_()

    def there_and_back(x):
        values, indices = max_pool2d(x, *w, return_indices=True, indices="compact")
        return max_unpool2d(values * values, indices)

    assert torch.autograd.gradcheck(there_and_back, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(there_and_back, x)


def test_vmap():
    x = normal((4, 2, 3, 6, 6))

    def f(x):
        return max_unpool2d(*pooled(x, (2,)))

    assert torch.equal(torch.func.vmap(f)(x), torch.stack([f(y) for y in x]))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(memory_format):
    x = normal((2, 3, 7, 8), torch.float64, memory_format)
    _, compact = pooled(x, (3, 2, 1))
    values = normal(compact.positions.shape, torch.float64, memory_format).requires_grad_()
    for indices in (compact.positions, compact.flat()):
        for sum in (False, True):
            opcheck(torch.ops.fastcv.max_unpool2d, (values, indices, 7, 8, *compact.window, sum))
            opcheck(
                torch.ops.fastcv.max_unpool2d_backward,
                (x.clone().requires_grad_(), indices, *compact.window, sum),
            )


class Segmenter(torch.nn.Module):
    """The pooling of SegNet."""

    def __init__(self, window, indices):
        super().__init__()
        self.window, self.indices = window, indices

    def forward(self, x):
        values, indices = max_pool2d(x, *self.window, return_indices=True, indices=self.indices)
        return max_unpool2d(values * 2, indices, *self.window, output_size=x.shape[-2:])


@pytest.mark.parametrize("indices", ["int64", "compact"])
@pytest.mark.parametrize("w", [(2, 2, 0), (3, 2, 1)], ids=str)
def test_onnx_export(w, indices, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    x = normal((2, 3, 9, 11))
    model = Segmenter(w, indices).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), str(path), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.equal(torch.from_numpy(out), model(x))


def test_errors():
    x = normal((1, 2, 4, 6))
    values, indices = max_pool2d(x, 2, return_indices=True)
    _, compact = pooled(x, (2,))
    for bad in (24, -1, 2**40):
        wrong = indices.clone()
        wrong[0, 1, 1, 2] = wrong[0, 1, 0, 1] = bad
        with pytest.raises(RuntimeError, match=rf"indices: expected 0 to 23, got {bad} at \[0, 1, 0, 1\]"):
            max_unpool2d(values, wrong, 2)
        with pytest.raises(RuntimeError, match=r"\[0, 1, 0, 1\]"):
            torch.ops.fastcv.max_unpool2d_backward(x, wrong, *window(2, 2, 0), False)
    wrong = compact.positions.clone()
    wrong[0, 1, 1, 0] = 4
    for call in (
        lambda: max_unpool2d(values, compact._replace(positions=wrong)),
        lambda: torch.ops.fastcv.max_unpool2d_backward(x, wrong, *window(2, 2, 0), False),
    ):
        with pytest.raises(RuntimeError, match=r"indices: .* got 4 at \[0, 1, 1, 0\]"):
            call()
    with pytest.raises(TypeError, match=r"indices.*torch.int32"):
        max_unpool2d(values, indices.int(), 2)
    with pytest.raises(TypeError, match="kernel_size"):
        max_unpool2d(values, indices)
    with pytest.raises(ValueError, match=r"indices.*shape"):
        max_unpool2d(values, indices[:, :1], 2)
    with pytest.raises(ValueError, match=r"kernel_size.*those of indices"):
        max_unpool2d(values, compact, 3)
    with pytest.raises(ValueError, match="output_size"):
        max_unpool2d(values, compact, output_size=(5, 6))
    with pytest.raises(ValueError, match=r"output_size.*\(4, 6\)"):
        max_unpool2d(values, indices, 2, output_size=(6, 6))
    assert isinstance(compact, PooledIndices)
