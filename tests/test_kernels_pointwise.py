"""The fused blocks of the image models: Triton kernels (interpreted without a GPU) against the eager definitions."""
import pytest
import torch

import kernels
from kernels import pointwise
from kernels.pointwise import de_combine, df_block
from tests.test_kernels_attention import assert_as_accurate, poison, run  # noqa: F401  (poison: fills torch.empty with NaN)

PATHS = ["reference", "triton"]
SHAPES = [(1, 1, 1, 1), (2, 3, 7, 7), (1, 20, 5, 13), (2, 2, 17, 71)]           # the last needs two tiles of 1,024


def block_inputs(name, shape, device, seed=0):
    """x and four vectors, or h, skip, three vectors, two maps; an eighth of the vectors is zero or negative."""
    B, C, H, W = shape
    shapes = [shape] + [(B, C)] * 4 if name == "df_block" else [shape] * 2 + [(B, C)] * 3 + [(B, 1, H, W)] * 2
    g = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    inputs[-3].view(-1)[::8] = 0
    return [x.to(device) for x in inputs]


def slow(name, *inputs, slope):
    """Element by element, from the equations in the file's head."""
    def leaky(a):
        return torch.where(a > 0, a, slope * a)
    out = torch.empty_like(inputs[0])
    for b in range(out.shape[0]):
        for c in range(out.shape[1]):
            if name == "df_block":
                x, g0, b0, g1, b1 = inputs
                out[b, c] = leaky(g1[b, c] * leaky(g0[b, c] * x[b, c] + b0[b, c]) + b1[b, c])
            else:
                h, skip, gamma, beta, w, W, S = inputs
                channel, spatial = leaky(gamma[b, c] * h[b, c] + beta[b, c]), leaky(W[b, 0] * h[b, c] + S[b, 0])
                out[b, c] = w[b, c] * channel + (1 - w[b, c]) * spatial + skip[b, c]
    return out


BLOCKS = {"df_block": df_block, "de_combine": de_combine}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_block_equals_a_loop_over_channels(name, shape, device):
    inputs = block_inputs(name, shape, device)
    truth = run("reference", torch.float64, lambda *x: slow(name, *x, slope=0.3), inputs)
    theirs = run("reference", torch.float32, BLOCKS[name], inputs, slope=0.3)
    assert_as_accurate(theirs, theirs, truth, torch.float32)
    assert_as_accurate(run("triton", torch.float32, BLOCKS[name], inputs, slope=0.3), theirs, truth, torch.float32)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_accurate_as_pytorch(name, dtype, device):
    inputs = [x.to(dtype).double() for x in block_inputs(name, (2, 3, 9, 12), device)]
    truth, theirs = (run("reference", t, BLOCKS[name], inputs) for t in (torch.float64, dtype))
    assert_as_accurate(run("triton", dtype, BLOCKS[name], inputs), theirs, truth, dtype)


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_equal_finite_differences(name, device):
    inputs = [x.requires_grad_() for x in block_inputs(name, (1, 2, 3, 5), device)]
    with kernels.use("triton"):
        assert torch.autograd.gradcheck(BLOCKS[name], inputs, fast_mode=True)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_second_derivative_is_refused_in_words(name, device):
    inputs = [x.float().requires_grad_() for x in block_inputs(name, (1, 2, 4, 4), device)]
    for path, twice in ("triton", False), ("reference", True):
        with kernels.use(path):
            loss = BLOCKS[name](*inputs).square().sum()
        if twice:
            torch.autograd.grad(loss, inputs[0], create_graph=True)[0].sum().backward()
        else:
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(loss, inputs[0], create_graph=True)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_same_bits_every_time_and_for_any_layout(name, device):
    inputs = block_inputs(name, (2, 17, 16, 20), device)

    def turned(*x):
        return BLOCKS[name](*(t.to(memory_format=torch.channels_last) if t.ndim == 4 else t.T.contiguous().T for t in x))

    first = run("triton", torch.float32, BLOCKS[name], inputs)
    for other in (run("triton", torch.float32, BLOCKS[name], inputs), run("triton", torch.float32, turned, inputs)):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_tile_sizes_change_rounding_only(device, monkeypatch):
    inputs = {name: block_inputs(name, (1, 5, 16, 30), device) for name in BLOCKS}
    plain = {name: run("triton", torch.float32, BLOCKS[name], inputs[name]) for name in BLOCKS}
    monkeypatch.setattr(pointwise, "_tile", lambda pixels: (256, 1))
    monkeypatch.setattr(pointwise, "BLOCK_C", 4)
    for name in BLOCKS:
        for a, b in zip(run("triton", torch.float32, BLOCKS[name], inputs[name]), plain[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)                        # sums of up to 480 terms


@pytest.mark.parametrize("name", BLOCKS)
def test_the_kink_has_the_slope_pytorch_gives_it(name, device):
    """Zero weights and biases: every LeakyReLU sits at exactly 0, where its derivative is a convention."""
    inputs = block_inputs(name, (1, 2, 4, 4), device)
    for zeroed in ((1, 2), (3, 4)) if name == "df_block" else ((2, 3), (5, 6)):
        there = [torch.zeros_like(x) if n in zeroed else x for n, x in enumerate(inputs)]
        ours, theirs = (run(path, torch.float32, BLOCKS[name], there) for path in ("triton", "reference"))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_identity_at_the_start(device):
    x, one, zero = torch.randn(2, 3, 4, 4, device=device).abs(), torch.ones(2, 3, device=device), torch.zeros(2, 3, device=device)
    for path in PATHS:
        with kernels.use(path):
            assert torch.equal(df_block(x, one, zero, one, zero), x)                      # positive x passes unchanged
            half = de_combine(x, x, one, zero, one / 2, torch.ones_like(x[:, :1]), torch.zeros_like(x[:, :1]))
            torch.testing.assert_close(half, 2 * x)


def test_autocast_brings_everything_to_the_dtype_of_x(device):
    inputs = [t.float() for t in block_inputs("df_block", (1, 2, 4, 4), device)]
    for path in PATHS:
        with kernels.use(path), torch.autocast(device.type, torch.bfloat16):
            assert df_block(inputs[0].bfloat16(), *inputs[1:]).dtype == torch.bfloat16


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty_pictures_stay_empty(path, shape, device):
    for name in BLOCKS:
        out, *grads = run(path, torch.float32, BLOCKS[name], block_inputs(name, shape, device)[:99])
        assert out.shape == shape and not any(g.any() for g in grads)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("change, sentence", [
    (lambda x: {"x": x[0]}, "must be floating point \\(B, C, H, W\\)"),
    (lambda x: {"x": x.int()}, "torch.int32"),
    (lambda x: {"b0": torch.zeros(3)}, "b0 is \\(3,\\), but the first tensor .* asks for \\(2, 3\\)"),
    (lambda x: {"g1": torch.zeros(2, 3).double()}, "g1 is torch.float64"),
    (lambda x: {"g0": torch.zeros(2, 3, device="meta")}, "g0 is torch.float32 on meta"),
])
def test_bad_input_is_answered_with_a_sentence(path, change, sentence, device):
    x, v = torch.zeros(2, 3, 4, 4, device=device), torch.zeros(2, 3, device=device)
    arguments = {"x": x, "g0": v, "b0": v, "g1": v, "b1": v}
    arguments |= {k: t if t.is_meta else t.to(device) for k, t in change(x).items()}
    with kernels.use(path), pytest.raises(ValueError, match=sentence):
        df_block(**arguments)


def test_maps_need_one_channel(device):
    x, v = torch.zeros(2, 3, 4, 4, device=device), torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match=r"W is \(2, 3, 4, 4\), but the first tensor .* asks for \(2, 1, 4, 4\)"):
        de_combine(x, x, v, v, v, x, x)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_a_batch_beyond_two_to_the_31_numbers(name):
    B, C, side = 33, 1024, 256                                                # 2.2e9 numbers, 4.4 GB in bf16
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    x = torch.randn(B, C, side, side, device="cuda", dtype=torch.bfloat16)
    small = [t.to("cuda", torch.bfloat16) for t in block_inputs(name, (B, C, 1, 1), "cpu") if t.ndim == 2]
    maps = [x[:, :1].clone(), x[:, 1:2].clone()] if name == "de_combine" else []
    whole = [x, x, *small, *maps] if maps else [x, *small]
    with kernels.use("triton"):
        out, alone = BLOCKS[name](*whole), BLOCKS[name](*(t[-1:] for t in whole))
    assert torch.equal(out[-1:], alone)


def test_a_picture_beyond_the_grid_is_refused_in_words(device):
    x, v = torch.zeros(1, 1, 1, 1, device=device).expand(-1, -1, 2 ** 11, 2 ** 12), torch.zeros(1, 1, device=device)
    with kernels.use("triton"), pytest.raises(ValueError, match="more than 8,388,480 pixels"):
        df_block(x, v, v, v, v)
