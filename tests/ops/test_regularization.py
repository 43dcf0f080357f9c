import pytest
import torch

from fastcv.ops.regularization import (
    DropBlock2d,
    DropBlock3d,
    StochasticDepth,
    drop_block2d,
    drop_block3d,
    stochastic_depth,
)

DROP_BLOCK = {2: drop_block2d, 3: drop_block3d}
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def ones(spatial, *sizes, dtype=torch.float32):
    """[2, 3, *sizes], the last size repeated."""
    sizes = (*sizes, *[sizes[-1]] * (spatial - len(sizes)))
    return torch.ones(2, 3, *sizes, dtype=dtype)


# ---- by hand -------------------------------------------------------------------------------------


def test_stochastic_depth_by_hand():
    torch.manual_seed(0)
    rows = torch.arange(1.0, 9.0)[:, None].expand(8, 3)
    for p, scale in ((0.5, 2.0), (0.75, 4.0)):
        kept = stochastic_depth(rows, p, "row")
        factors = kept / rows
        assert (factors == factors[:, :1]).all()  # a row lives or dies as a whole
        assert set(factors.unique().tolist()) == {0.0, scale}
    outcomes = {tuple(stochastic_depth(torch.ones(2), 0.5, "batch").tolist()) for _ in range(40)}
    assert outcomes == {(0.0, 0.0), (2.0, 2.0)}
    assert stochastic_depth(rows, 1.0, "row").eq(0).all()
    assert stochastic_depth(rows, 1, "batch").eq(0).all()


def test_one_block_by_hand(monkeypatch):
    # A seed at (1, 0) of the 2 x 3 places where a 3 x 3 block fits into 4 x 5: rows 1 to 3 and
    # columns 0 to 2 go; 11 of 20 stay, times 20 / 11.
    seeds = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda noise, p: noise.copy_(seeds))
    result = drop_block2d(torch.ones(1, 1, 4, 5), 0.1, 3, eps=0.0)
    expected = torch.ones(4, 5)
    expected[1:4, 0:3] = 0
    torch.testing.assert_close(result[0, 0], expected * 20 / 11)


def test_seed_probability_by_hand(monkeypatch):
    # Equation 1: p / block_size^2 * (feature area / area where blocks may start).
    seen = []
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda noise, p: seen.append(p) or noise.zero_())
    drop_block2d(torch.ones(1, 1, 6, 8), 0.2, 3)
    drop_block3d(torch.ones(1, 1, 4, 6, 8), 0.2, 3)
    assert seen == pytest.approx([0.2 / 9 * 48 / (4 * 6), 0.2 / 27 * 192 / (2 * 4 * 6)])


# ---- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_stochastic_depth_expectation_and_gradient(mode):
    torch.manual_seed(1)
    branch = torch.ones(20_000, 1, requires_grad=True)
    kept = stochastic_depth(branch, 0.2, mode)
    kept.sum().backward()
    assert torch.equal(branch.grad, kept)  # the factors themselves
    if mode == "row":
        assert kept.mean().item() == pytest.approx(1, abs=0.02)
        assert (kept == 0).float().mean().item() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("spatial", [2, 3])
def test_drop_block_drops_whole_blocks(spatial, block_size):
    torch.manual_seed(2)
    x = ones(spatial, 10, 9)
    dropped = 0
    for _ in range(10):
        result = DROP_BLOCK[spatial](x, 0.15, block_size)
        assert result.shape == x.shape
        assert result.mean().item() == pytest.approx(1, abs=1e-4)
        gone = result == 0
        dropped += gone.float().mean().item() / 10
        # Opening by a block leaves a union of blocks as it is: every hole is made of whole blocks.
        pool = torch.nn.functional.max_pool2d if spatial == 2 else torch.nn.functional.max_pool3d
        whole = 1 - pool(1 - gone.float(), block_size, stride=1)
        padding = [block_size - 1] * (2 * spatial)
        covered = pool(torch.nn.functional.pad(whole, padding), block_size, stride=1)
        assert torch.equal(covered.bool(), gone)
    assert 0.03 < dropped < 0.3


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("spatial", [2, 3])
def test_drop_block_keeps_the_mean_in_every_type(spatial, dtype):
    torch.manual_seed(3)
    x = torch.ones(2, 64, *{2: (32, 32), 3: (8, 16, 16)}[spatial], dtype=dtype)
    assert x.numel() > 65_504  # more ones than float16 can count
    result = DROP_BLOCK[spatial](x, 0.2, 3)
    assert result.dtype is dtype
    assert result.double().mean().item() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("spatial", [2, 3])
def test_drop_block_options(spatial):
    torch.manual_seed(4)
    drop, x = DROP_BLOCK[spatial], ones(spatial, 9)
    assert drop(x, 0.0, 3) is x
    assert drop(x, 0.5, 3, training=False) is x
    empty = x[:0]
    assert drop(empty, 0.5, 3).shape == empty.shape
    large = drop(x, 0.5, 50)  # the block becomes the whole map
    assert all(channel.unique().numel() == 1 for channel in large.flatten(0, 1))
    assert drop(ones(spatial, 4, 9), 0.3, 7).shape == ones(spatial, 4, 9).shape

    torch.manual_seed(5)
    expected = drop(x, 0.3, 3)
    torch.manual_seed(5)
    copy = x.clone()
    assert drop(copy, 0.3, 3, inplace=True) is copy
    torch.testing.assert_close(copy, expected)


def test_layers():
    x = torch.ones(4, 2, 6, 6)
    cases = (
        (StochasticDepth(0.5, "row"), x, "StochasticDepth(p=0.5, mode=row)"),
        (DropBlock2d(0.2, 3), x, "DropBlock2d(p=0.2, block_size=3, inplace=False)"),
        (DropBlock3d(0.2, 3), x[None], "DropBlock3d(p=0.2, block_size=3, inplace=False)"),
    )
    torch.manual_seed(6)
    for layer, input, text in cases:
        assert repr(layer) == text
        assert (layer(input) == 0).any()
        assert layer.eval()(input) is input


def test_compiles_exports_and_traces():
    model = torch.nn.Sequential(StochasticDepth(0.5, "row"), DropBlock2d(0.2, 3))
    x = torch.ones(8, 2, 9, 9)
    torch.manual_seed(7)
    expected = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    traced = torch.fx.symbolic_trace(model)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (x[:4],), dynamic_shapes=({0: batch},)).module()
    for other in (compiled, traced, exported):
        torch.manual_seed(7)
        torch.testing.assert_close(other(x), expected)
    assert {n.name for n in traced.graph.nodes} >= {"stochastic_depth", "drop_block2d"}


# ---- against torchvision: the same random numbers, so the same values ----------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_stochastic_depth_like_torchvision(dtype):
    tv = pytest.importorskip("torchvision").ops
    for seed in range(100):
        shape = [(5,), (0, 3), (4, 3), (3, 2, 4, 4), (2, 1, 3, 2, 2)][seed % 5]
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        mode, p = ("row", "batch")[seed % 2], (0, 0.1, 0.5, 0.9, 1.0)[seed % 7 % 5]
        results = []
        for function in (stochastic_depth, tv.stochastic_depth):
            torch.manual_seed(seed)
            results.append(function(x, p, mode))
        torch.testing.assert_close(*results, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spatial", [2, 3])
def test_drop_block_like_torchvision(spatial, dtype):
    tv = pytest.importorskip("torchvision").ops
    theirs = {2: tv.drop_block2d, 3: tv.drop_block3d}[spatial]
    tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-5  # torchvision counts in the input's type
    for seed in range(40):
        sizes = [(7,), (9, 5), (3, 11), (1, 5)][seed % 4]
        x = ones(spatial, *sizes, dtype=dtype) * 3
        block_size, p = (1, 3, 5)[seed % 3], (0.0, 0.05, 0.3, 1.0)[seed % 5 % 4]
        if min(block_size, *sizes) % 2 == 0:
            continue
        results = []
        for function in (DROP_BLOCK[spatial], theirs):
            torch.manual_seed(seed)
            results.append(function(x, p, block_size, False, 1e-3))
        torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)


def test_layers_like_torchvision():
    tv = pytest.importorskip("torchvision").ops
    for name, arguments in (
        ("StochasticDepth", (0.3, "batch")),
        ("DropBlock2d", (0.3, 3, True, 1e-3)),
        ("DropBlock3d", (0.3, 5)),
    ):
        mine, theirs = (cls(*arguments) for cls in (globals()[name], getattr(tv, name)))
        assert repr(mine) == repr(theirs) and mine.state_dict() == theirs.state_dict()
        x = torch.ones(2, 3, 7, 7, 7)[:, :, 0] if name == "DropBlock2d" else torch.ones(2, 3, 7, 7, 7)
        results = []
        for layer in (mine, theirs):
            torch.manual_seed(8)
            results.append(layer(x.clone()))
        torch.testing.assert_close(*results)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: stochastic_depth(x, 1.1, "row"), ValueError, r"p:.*\[0, 1\].*1.1"),
        (lambda x: stochastic_depth(x, 0.1, "rows"), ValueError, "mode.*'row'.*'rows'"),
        (lambda x: stochastic_depth(x.int(), 0.1, "row"), TypeError, "input.*int32"),
        (lambda x: stochastic_depth(x.sum(), 0.1, "row"), ValueError, "input.*scalar"),
        (lambda x: drop_block2d(x, -0.1, 3), ValueError, r"p:.*\[0, 1\].*-0.1"),
        (lambda x: drop_block2d(x[0], 0.1, 3), ValueError, r"\[N, C, H, W\].*\[2, 4, 4\]"),
        (lambda x: drop_block3d(x, 0.1, 3), ValueError, r"\[N, C, D, H, W\].*\[1, 2, 4, 4\]"),
        (lambda x: drop_block2d(x, 0.1, 0), ValueError, "block_size.*at least 1.*0"),
        (lambda x: drop_block2d(x, 0.1, 3.0), TypeError, "block_size.*int.*3.0"),
        (lambda x: drop_block2d(x.long(), 0.1, 3), TypeError, "input.*int64"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(1, 2, 4, 4))
