import math

import pytest
import torch
from roi_cases import FLOATS, FORMATS, TOLERANCE, compiled_only, one_thread

from fastcv import reference
from fastcv.ops import MultiScaleRoIAlign, multiscale_roi_align, roi_align

NAN = math.nan
MAP = torch.zeros(2, 3, 8, 9)
SCALES = [1 / 4, 1 / 8, 1 / 16]

forward_op = torch.ops.fastcv.multiscale_roi_align.default
backward_op = torch.ops.fastcv.multiscale_roi_align_backward.default


def random_pyramid(generator, n=2, c=5, side=128, scales=SCALES, k=8, dtype=torch.float32, boxes_dtype=torch.float64):
    """Maps of images of side x 1.5 side, and regions of all sizes."""
    maps = [
        torch.randn(n, c, round(side * s), round(1.5 * side * s), generator=generator, dtype=torch.float64).to(dtype)
        for s in scales
    ]
    centre = torch.rand(k, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.5 * side, side])
    half = torch.exp2(torch.rand(k, 2, generator=generator, dtype=torch.float64) * 4 + math.log2(side) - 4.5)
    image = torch.randint(max(n, 1), (k, 1), generator=generator)
    return maps, torch.cat([image, centre - half, centre + half], dim=1).to(boxes_dtype)


def squares(*sides, dtype=torch.float32):
    return torch.tensor([[0, 0, 0, side, side] for side in sides], dtype=dtype)


def levels_of(boxes, levels, **canonical):
    """The level that each region is pooled from, on maps that hold their number."""
    maps = [torch.full((1, 1, 2, 2), float(i)) for i in range(len(levels))]
    scales = [2.0**-k for k in levels]
    return multiscale_roi_align(maps, boxes, 1, scales, 1, **canonical).flatten().tolist()


# ---- by hand -------------------------------------------------------------------------------------


def test_levels_by_hand():
    # The canonical side belongs on the canonical level; half of it, one level finer.
    boxes = squares(4, 8, 16, 31)
    small = {"canonical_scale": 16, "canonical_level": 4}
    assert levels_of(boxes, (2, 3, 4), **small) == [0, 1, 2, 2]
    assert levels_of(boxes, (3, 4, 5), **small) == [0, 0, 1, 1]
    assert levels_of(boxes, (2, 4), **small) == [0, 1, 1, 1]  # a missing level: the next coarser
    assert levels_of(boxes, (2, 3, 4), canonical_scale=16, canonical_level=3) == [0, 0, 1, 1]
    assert levels_of(boxes, (7,), **small) == [0, 0, 0, 0]


def test_regions_without_an_area_go_to_the_finest_level():
    boxes = torch.tensor([[0, 8, 8, 8, 8], [0, 8, 0, 0, 8], [0, 0, 0, NAN, 0], [0, 0, 0, 8, 0]])
    maps = [torch.ones(1, 1, 40, 40), torch.full((1, 1, 20, 20), 2.0)]
    pooled = multiscale_roi_align(maps, boxes, 1, [1 / 4, 1 / 8], 1)
    assert pooled.flatten().tolist() == [1, 1, 0, 1]


def test_maps_of_one_level_are_pooled_like_roi_align():
    maps, boxes = random_pyramid(torch.Generator().manual_seed(0), scales=[1 / 8])
    for ratio, aligned in ((-1, False), (2, True)):
        pooled = multiscale_roi_align(maps, boxes, (3, 2), [1 / 8], ratio, aligned)
        assert torch.equal(pooled, roi_align(maps[0], boxes, (3, 2), 1 / 8, ratio, aligned))


def test_each_region_is_pooled_from_its_level():
    maps, boxes = random_pyramid(torch.Generator().manual_seed(1), k=30)
    pooled = multiscale_roi_align(maps, boxes, 3, SCALES, 2, canonical_scale=56)
    levels = reference.roi_align.roi_levels(boxes, SCALES, 56, 4)
    assert set(levels.tolist()) == {0, 1, 2}
    for i, level in enumerate(levels.tolist()):
        torch.testing.assert_close(pooled[i : i + 1], roi_align(maps[level], boxes[i : i + 1], 3, SCALES[level], 2))


# ---- against the reference -------------------------------------------------------------------------


def check(maps, boxes, size, scales=SCALES, ratio=2, aligned=False, canonical_scale=56):
    """Forward and backward against the reference in float64."""
    leaves = [m.detach().requires_grad_() for m in maps]
    pooled = multiscale_roi_align(leaves, boxes, size, scales, ratio, aligned, canonical_scale=canonical_scale)
    grad = torch.empty_like(pooled).copy_(torch.linspace(-1, 1, pooled.numel()).reshape(pooled.shape))
    gradients = torch.autograd.grad(pooled, leaves, grad)
    constants = (ratio, aligned, canonical_scale, 4)
    sizes = (*maps[0].shape[:2], [m.shape[2] for m in maps], [m.shape[3] for m in maps])
    with one_thread():
        expected = reference.roi_align.multiscale_roi_align(
            [m.double() for m in maps], boxes, scales, *pooled.shape[2:], *constants
        )
        expected_gradients = reference.roi_align.multiscale_roi_align_backward(
            grad.double(), boxes, scales, *pooled.shape[2:], *sizes, *constants
        )
    tolerance = TOLERANCE[maps[0].dtype]
    for result, wanted, terms in zip(
        (pooled, *gradients), (expected, *expected_gradients), (1, *[max(1, len(boxes))] * len(maps)), strict=True
    ):
        assert result.dtype is maps[0].dtype
        atol = min(tolerance, 1e-5) * terms
        torch.testing.assert_close(result, wanted, rtol=tolerance, atol=atol, check_dtype=False)
    return pooled, gradients


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_shapes(dtype, memory_format):
    generator = torch.Generator().manual_seed(2)
    for i, c in enumerate((1, 2, 3, 7, 8, 9, 16, 17, 70)):
        scales = [2.0**-k for k in range(2, 3 + i % 4)]
        maps, boxes = random_pyramid(generator, i % 3 + 1, c, 64, scales, 6, dtype)
        maps = [m.contiguous(memory_format=memory_format) for m in maps]
        pooled, gradients = check(maps, boxes, (i % 3 + 1, 2), scales, (0, 2)[i % 2], i % 4 < 2)
        if c > 1:
            assert pooled.is_contiguous(memory_format=memory_format)
            assert all(g.is_contiguous(memory_format=memory_format) for g in gradients)


def test_maps_of_mixed_layouts():
    maps, boxes = random_pyramid(torch.Generator().manual_seed(3), k=6)
    maps[1] = maps[1].contiguous(memory_format=torch.channels_last)
    maps[2] = torch.stack([maps[2]] * 3, dim=-1)[..., 1]
    for order in ((0, 1, 2), (1, 0, 2)):  # the format of the output is the first map's
        check([maps[i] for i in order], boxes, 2, [SCALES[i] for i in order])
    check([m[:1, :1].expand(m.shape) for m in maps], boxes, 2)


def test_empty():
    for n, c, k in ((0, 3, 0), (2, 0, 3), (2, 3, 0)):
        maps, boxes = random_pyramid(torch.Generator().manual_seed(4), n, c, k=k)
        pooled, _ = check(maps, boxes, (2, 3))
        assert pooled.shape == (k, c, 2, 3)
    maps, boxes = random_pyramid(torch.Generator().manual_seed(4))
    per_image = [boxes[:0, 1:], boxes[:, 1:]]
    boxes[:, 0] = 1
    assert torch.equal(multiscale_roi_align(maps, per_image, 2, SCALES), multiscale_roi_align(maps, boxes, 2, SCALES))


@compiled_only
@pytest.mark.parametrize("memory_format", FORMATS)
def test_equal_for_any_number_of_threads(memory_format):
    maps, boxes = random_pyramid(torch.Generator().manual_seed(5), c=19, k=40)
    maps = [m.contiguous(memory_format=memory_format).requires_grad_() for m in maps]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            pooled = multiscale_roi_align(maps, boxes, 3, SCALES, canonical_scale=56)
            results.append((pooled, *torch.autograd.grad(pooled.square().sum(), maps)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


# ---- against torchvision ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layer_like_torchvision(dtype):
    tv = pytest.importorskip("torchvision").ops
    generator = torch.Generator().manual_seed(6)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-11}[dtype]
    for i in range(60):
        first, side = 1 + i % 4, (128, 192)[i % 2]
        scales = [2.0**-k for k in range(first, first + 1 + i % 3)]
        maps, boxes = random_pyramid(generator, 2, 1 + i % 9, side, scales, 12, dtype, dtype)
        lists = [boxes[boxes[:, 0] == j, 1:] for j in range(2)]
        shapes = [(side, round(1.5 * side)), (side - 9, side)]
        names = [str(j) for j in range(len(maps))]
        arguments = (names, (i % 4 + 1, 3), (2, 0, -1, 3)[i % 4])
        canonical = {"canonical_scale": (224, 56)[i // 2 % 2], "canonical_level": 3 + i % 2}
        results = []
        for module in (MultiScaleRoIAlign, tv.MultiScaleRoIAlign):
            leaves = [m.clone().requires_grad_() for m in maps]
            x = {**dict(zip(names, leaves, strict=True)), "pool": maps[-1][:, :, ::2]}
            pooled = module(*arguments, **canonical)(x, lists, shapes)
            gradients = torch.autograd.grad(pooled.square().sum(), leaves, materialize_grads=True)
            results.append((pooled, *gradients))
        for result, expected in zip(*results, strict=True):
            torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    assert repr(MultiScaleRoIAlign(*arguments)) == repr(tv.MultiScaleRoIAlign(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boundaries_of_levels_like_torchvision(dtype):
    poolers = pytest.importorskip("torchvision.ops.poolers")
    rows = []
    for side in (56.0, 112.0, 224.0, 448.0, 896.0):
        exact = torch.tensor(side, dtype=dtype)
        below, above = (torch.nextafter(exact, torch.tensor(end, dtype=dtype)) for end in (0.0, 1e9))
        rows += [[0, 0, w, h] for w in (below, exact, above) for h in (below, exact, above)]
        # Where 1e-6 of a level decides, and twice as wide as high.
        rows += [[0, 0, side * 2**e, side] for e in (-2e-5, -4e-6, -1e-6, 1e-6, 4e-6)]
        rows += [[0, 0, 2 * w, exact / 2] for w in (below, exact, above)]
    boxes = torch.tensor(rows, dtype=dtype)
    expected = poolers.LevelMapper(2, 5)([boxes])
    assert expected.unique().tolist() == [0, 1, 2, 3]
    # All coordinates are within the maps, which hold their number.
    maps = [torch.full((1, 1, 1800 >> k, 1800 >> k), float(k - 2), dtype=dtype) for k in (2, 3, 4, 5)]
    rois = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1)
    pooled = multiscale_roi_align(maps, rois, 1, [2.0**-k for k in (2, 3, 4, 5)], 1)
    assert pooled.flatten().tolist() == expected.tolist()


def test_missing_level_differs_from_torchvision():
    # Maps at 1/8 and 1/32: torchvision takes the second for 1/16, so a region for 1/32 finds none.
    tv = pytest.importorskip("torchvision").ops
    maps = {"0": torch.full((1, 1, 64, 64), 1.0), "1": torch.full((1, 1, 16, 16), 2.0)}
    boxes = [torch.tensor([[0.0, 0, 112, 112], [0, 0, 224, 224], [0, 0, 448, 448]])]
    pooled = [
        module(["0", "1"], 1, 2)(maps, boxes, [(512, 512)]).flatten().tolist()
        for module in (MultiScaleRoIAlign, tv.MultiScaleRoIAlign)
    ]
    assert pooled == [[1, 2, 2], [1, 2, 0]]


# ---- derivatives, transforms and the compiler ----------------------------------------------------------


@pytest.fixture(params=FORMATS, ids=str)
def small(request):
    """A pyramid in float64 and the function of its maps; both levels are in use."""
    maps, boxes = random_pyramid(torch.Generator().manual_seed(7), 2, 2, 16, [1 / 4, 1 / 8], 4, torch.float64)
    maps = [m.contiguous(memory_format=request.param) for m in maps]
    return maps, boxes, lambda *maps: multiscale_roi_align(maps, boxes, 2, [1 / 4, 1 / 8], 2, canonical_scale=12)


def test_derivatives(small):
    maps, _, function = small
    leaves = [m.requires_grad_() for m in maps]
    # Its batched checks use torch's former vmap, which takes no list of tensors; torch.func.vmap is tested below.
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True)
    assert all(g.any() for g in torch.autograd.grad(function(*leaves).sum(), leaves))
    # Only one of the maps has a derivative.
    constant = maps[0].detach()
    assert torch.autograd.gradcheck(lambda m: function(constant, m), leaves[1], check_forward_ad=True)


def test_derivatives_by_transforms(small):
    maps, _, function = small
    value, derivative = torch.func.jvp(lambda m: function(maps[0], m), (maps[1],), (maps[1].cos(),))
    torch.testing.assert_close(value, function(*maps))
    torch.testing.assert_close(derivative, function(torch.zeros_like(maps[0]), maps[1].cos()))
    jacobians = torch.func.jacrev(function, argnums=(0, 1))(*maps)
    hessian = torch.func.hessian(lambda *m: function(*m).square().sum() / 2, argnums=(0, 1))(*maps)
    a, b = (j.reshape(value.numel(), -1) for j in jacobians)
    torch.testing.assert_close(hessian[0][1].reshape(a.shape[1], b.shape[1]), a.T @ b)
    torch.testing.assert_close(hessian[1][1].reshape(b.shape[1], b.shape[1]), b.T @ b)


@pytest.mark.parametrize("dims", [(0, 0, 0), (1, None, None), (None, 4, 1), (None, None, 0), (-1, 2, None)])
def test_vmap(dims):
    cases = [random_pyramid(torch.Generator().manual_seed(i), 2, 3, 16, [1 / 4, 1 / 8], 4) for i in range(3)]
    values = [torch.stack(v) for v in zip(*[(*maps, boxes) for maps, boxes in cases], strict=True)]
    values = [v[0] if d is None else v.movedim(0, d) for v, d in zip(values, dims, strict=True)]

    def function(fine, coarse, boxes):
        def pooled(*maps):
            return multiscale_roi_align(maps, boxes, 2, [1 / 4, 1 / 8], 2, canonical_scale=12)

        value, pullback = torch.func.vjp(pooled, fine, coarse)
        return value, *pullback(value.cos())

    results = torch.func.vmap(function, in_dims=dims)(*values)
    for i in range(3):
        one = [v if d is None else v.select(d, i) for v, d in zip(values, dims, strict=True)]
        torch.testing.assert_close(tuple(r[i] for r in results), function(*one))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(memory_format):
    maps, boxes = random_pyramid(torch.Generator().manual_seed(8), 2, 3, 16, [1 / 4, 1 / 8], 4)
    maps = [m.contiguous(memory_format=memory_format).requires_grad_() for m in maps]
    constants, rest = ([1 / 4, 1 / 8], 2, 3), (2, False, 24, 4)
    torch.library.opcheck(forward_op, (maps, boxes, *constants, *rest))
    grad = torch.randn(4, 3, 2, 3).contiguous(memory_format=memory_format).requires_grad_()
    torch.library.opcheck(backward_op, (grad, boxes, *constants, 2, 3, [4, 2], [6, 3], *rest))


@pytest.mark.parametrize("dynamic", [True, False])
def test_compile(dynamic):
    torch._dynamo.reset()
    layer = MultiScaleRoIAlign(["0", "1", "2"], 2, 2, canonical_scale=56)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seed, (n, k) in enumerate(((2, 6), (2, 9))):
        maps, boxes = random_pyramid(torch.Generator().manual_seed(seed), n, k=k)
        leaves = [m.requires_grad_() for m in maps]
        lists = [boxes[boxes[:, 0] == j, 1:] for j in range(n)]
        arguments = ({str(i): m for i, m in enumerate(leaves)}, lists, [(128, 192)] * n)
        results = [
            (p, *torch.autograd.grad(p.square().sum(), leaves)) for p in (compiled(*arguments), layer(*arguments))
        ]
        torch.testing.assert_close(*results)


def test_export_and_autocast():
    class Model(torch.nn.Module):
        def forward(self, maps, boxes):
            return multiscale_roi_align(maps, boxes, 2, SCALES, 2)

    case = random_pyramid(torch.Generator().manual_seed(9), k=5)
    dynamic = ([None] * 3, {0: torch.export.Dim("k", min=2, max=100)})
    exported = torch.export.export(Model(), case, dynamic_shapes=dynamic).module()
    other = random_pyramid(torch.Generator().manual_seed(10), k=11)
    torch.testing.assert_close(exported(*other), Model()(*other))
    expected = Model()(*other)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert torch.equal(Model()(*other), expected)
        assert Model()(other[0], other[1].bfloat16()).dtype is torch.float32


# ---- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inputs": []}, TypeError, "inputs: expected a non-empty list .* got list"),
        ({"inputs": MAP}, TypeError, "inputs: expected a non-empty list .* got Tensor"),
        ({"inputs": [MAP, 1]}, TypeError, r"inputs\[1\]: expected a Tensor, got int"),
        ({"inputs": [MAP, torch.zeros(3, 8, 9)]}, ValueError, r"inputs\[1\]: expected shape"),
        ({"inputs": [MAP, torch.zeros(1, 3, 8, 9)]}, ValueError, r"inputs\[1\]: .*\(2, 3\).*\(1, 3\)"),
        ({"inputs": [MAP, MAP.half()]}, ValueError, r"inputs\[1\]: .*float16"),
        ({"inputs": [MAP, MAP.int()]}, TypeError, r"inputs\[1\]: .*int32"),
        ({"inputs": [MAP, torch.zeros(2, 3, 8, 9, device="meta")]}, ValueError, r"inputs\[1\]: .*meta"),
        ({"spatial_scales": [0.25]}, ValueError, r"spatial_scales: expected 2 positive numbers, got \[0.25\]"),
        ({"spatial_scales": [0.25, 0]}, ValueError, "spatial_scales: expected 2 positive numbers"),
        ({"spatial_scales": [0.25, NAN]}, ValueError, "spatial_scales: expected 2 positive numbers"),
        ({"canonical_scale": 0}, ValueError, "canonical_scale: expected a positive number, got 0"),
        ({"boxes": torch.zeros(1, 4)}, ValueError, r"boxes: expected shape \[K, 5\]"),
        ({"boxes": [torch.zeros(1, 4)]}, ValueError, "boxes: expected a list of 2 tensors"),
        ({"boxes": torch.tensor([[0.0, 0, 0, 1, 1], [2, 0, 0, 1, 1]])}, RuntimeError, "boxes: row 1 has batch index 2"),
        ({"boxes": torch.zeros(1, 5, device="meta")}, ValueError, "boxes: expected the device of input"),
        ({"output_size": (0, 1)}, ValueError, "output_size"),
    ],
)
def test_errors(change, error, message):
    maps = [MAP, torch.zeros(2, 3, 4, 5)]
    arguments = {
        "inputs": maps,
        "boxes": torch.zeros(1, 5),
        "output_size": 2,
        "spatial_scales": [0.25, 0.125],
        **change,
    }
    with pytest.raises(error, match=message):
        multiscale_roi_align(**arguments)


def test_errors_of_the_layer():
    maps, boxes = {"0": torch.zeros(1, 3, 8, 9)}, [torch.zeros(1, 4)]
    with pytest.raises(ValueError, match=r"x: expected maps named \['1'\], got \['0'\]"):
        MultiScaleRoIAlign(["1"], 2, 2)(maps, boxes, [(32, 36)])
    with pytest.raises(ValueError, match=r"image_shapes: expected .* at least one image"):
        MultiScaleRoIAlign(["0"], 2, 2)(maps, boxes, [])
    with pytest.raises(ValueError, match="output_size"):
        MultiScaleRoIAlign(["0"], (2, 2, 2), 2)
    assert repr(MultiScaleRoIAlign(["0"], 2, 1)) == (
        "MultiScaleRoIAlign(featmap_names=['0'], output_size=(2, 2), sampling_ratio=1)"
    )


@compiled_only
def test_kernel_checks_what_memory_safety_needs():
    maps, boxes, rest = [torch.zeros(1, 3, 8, 9), torch.zeros(1, 3, 4, 5)], torch.zeros(1, 5), (2, 2, -1, False, 224, 4)
    for inputs, scales in (([], []), (maps, [1.0]), ([maps[0], maps[1][:, :2]], [1.0, 0.5]), ([maps[0][0]], [1.0])):
        with pytest.raises(RuntimeError, match="inputs: expected"):
            torch.ops.fastcv.multiscale_roi_align(inputs, boxes, scales, *rest)
    grad = torch.zeros(1, 3, 2, 2)
    with pytest.raises(RuntimeError, match="heights, widths: expected"):
        backward_op(grad, boxes, [1.0, 0.5], 2, 2, 1, 3, [8], [9], *rest[2:])
    with pytest.raises(RuntimeError, match="boxes: row 0 has batch index"):
        backward_op(grad, boxes - 1, [1.0, 0.5], 2, 2, 1, 3, [8, 4], [9, 5], *rest[2:])
