"""Cross-attention: the Triton kernels (interpreted without a GPU) and the reference against slow float64 loops."""
import math
from types import SimpleNamespace

import pytest
import torch

import kernels
from kernels import attention
from kernels.attention import _start, attention_map, cross_attention, frame_story_attention

PATHS = ["reference", "triton"]
# error allowed beside PyTorch's own; the interpreter truncates bf16 stores instead of rounding, hence twice as much
FACTOR = {torch.float64: 2, torch.float32: 2, torch.float16: 2, torch.bfloat16: 4 if kernels.interpreting() else 2}
FLOOR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}


@pytest.fixture(autouse=True)
def poison():
    """torch.empty is filled with NaN: an element that a kernel forgets cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def run(path, dtype, function, inputs, **options):
    """[output, gradient of each input] in float64, with a random but fixed gradient of the output."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    with kernels.use(path):
        out = function(*inputs, **options)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        grads = torch.autograd.grad(out, inputs, upstream.to(out.device, dtype))
    return [x.detach().double() for x in (out, *grads)]


def assert_as_accurate(ours, torchs, truth, dtype):
    """Each error at most FACTOR times PyTorch's, and no single row may hide a wrong one."""
    for mine, theirs, true in zip(ours, torchs, truth, strict=True):
        assert not mine.isnan().any()
        size = true.norm().clamp(min=1e-30)
        limit = FACTOR[dtype] * float((theirs - true).norm() / size) + FLOOR[dtype]
        assert float((mine - true).norm() / size) <= limit
        rows = (mine - true).flatten(0, -2) if true.ndim > 1 else (mine - true).reshape(1, -1)
        assert float(rows.norm(dim=-1).max()) <= 20 * limit * float(size) / math.sqrt(len(rows))


def qkv(B, Q, K, H, D, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, n, H, D, generator=g, dtype=torch.float64).to(device) for n in (Q, K, K)]


def slow_attention(q, k, v, lengths=None, mask=None, scale=None):
    """One query of one head at a time; a query that sees nothing gives 0."""
    out = []
    for b in range(len(q)):
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
        seen = seen if mask is None else seen & mask[b]
        if lengths is not None:
            seen[:, int(lengths[b]):] = False
        for i in range(q.shape[1]):
            for h in range(q.shape[2]):
                keys, values = k[b, seen[i], h], v[b, seen[i], h]
                weight = (keys @ q[b, i, h] * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(0)
                out.append((weight[:, None] * values).sum(0))
    return torch.stack(out).view(q.shape)


# -- cross-attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("Q, K, H, D", [(1, 1, 1, 16), (7, 20, 8, 8), (33, 77, 2, 40), (100, 128, 1, 64), (130, 20, 1, 24),
                                        (9, 77, 2, 80), (5, 33, 2, 160), (17, 200, 1, 32), (6, 5, 2, 20)])
def test_attention_is_as_accurate_as_pytorch(Q, K, H, D, device):
    inputs = qkv(2, Q, K, H, D, device)
    truth = run("reference", torch.float64, slow_attention, inputs)
    theirs = run("reference", torch.float32, cross_attention, inputs)
    assert_as_accurate(run("triton", torch.float32, cross_attention, inputs), theirs, truth, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_accurate_as_pytorch(dtype, device):
    inputs = [x.to(dtype).double() for x in qkv(2, 33, 77, 2, 40, device)]
    truth, theirs = (run("reference", t, cross_attention, inputs) for t in (torch.float64, dtype))
    assert_as_accurate(run("triton", dtype, cross_attention, inputs), theirs, truth, dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lengths, masked", [((5, 0, 9), False), ((9, 1, 3), True), (None, True)])
def test_ragged_and_masked_samples_equal_a_loop(path, lengths, masked, device):
    inputs = qkv(3, 6, 9, 2, 16, device)
    lengths = None if lengths is None else torch.tensor(lengths, device=device)
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)).gt(0.5).to(device) if masked else None
    if masked:
        mask[1] = False                                                                   # a sample that sees nothing
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    slow = run("reference", torch.float64, lambda *x: slow_attention(*x, lengths, None if mask is None else mask[:, None]),
               inputs)
    ours = run(path, dtype, cross_attention, inputs, lengths=lengths, mask=mask)
    for a, b in zip(ours, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
    assert all((a[1] == 0).all() for a in ours), "nothing seen: output and gradients are 0"


def test_a_mask_for_every_query_goes_to_the_reference(device):
    q, k, v = qkv(2, 4, 5, 1, 8, device)
    mask = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0)).gt(0.5).to(device)
    mask[0, 2] = False                                                                    # a fully masked row
    out, lse = cross_attention(q, k, v, mask=mask, return_lse=True)
    torch.testing.assert_close(out, slow_attention(q, k, v, mask=mask))
    assert (out[0, 2] == 0).all() and lse[0, 2, 0] == -torch.inf and attention_map(q, k, mask=mask)[0, 2].sum() == 0
    with kernels.use("triton"), pytest.raises(ValueError, match="a mask of its own for every query"):
        cross_attention(q.float(), k.float(), v.float(), mask=mask)


@pytest.mark.parametrize("path", PATHS)
def test_log_sum_exp_and_map_explain_the_output(path, device):
    q, k, v = (x.float() for x in qkv(2, 7, 9, 2, 24, device))
    lengths = torch.tensor([9, 4], device=device)
    with kernels.use(path):
        out, lse = cross_attention(q, k, v, lengths=lengths, scale=0.3, return_lse=True)
        mean = attention_map(q, k, lengths=lengths, scale=0.3)
    s = torch.einsum("bqhd,bkhd->bqhk", q, k).double() * 0.3
    s[1, ..., 4:] = -torch.inf
    torch.testing.assert_close(lse.double(), s.logsumexp(-1), rtol=0, atol=2e-6)
    torch.testing.assert_close(mean.double(), s.softmax(-1).mean(2), rtol=0, atol=1e-6)
    weights = (s - lse.double()[..., None]).exp()                                         # what the log-sum-exp is for
    torch.testing.assert_close(torch.einsum("bqhk,bkhd->bqhd", weights, v.double()), out.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_a_masked_sample_explains_itself_too(path, device):
    q, k, v = (x.float() for x in qkv(3, 5, 6, 2, 16, device))
    lengths, mask = torch.tensor([6, 3, 4], device=device), torch.tensor([[1, 0, 1, 1, 0, 1]] * 3, device=device).bool()
    mask[2] = False                                                                       # sees nothing
    with kernels.use(path):
        _, lse = cross_attention(q, k, v, lengths=lengths, mask=mask, return_lse=True)
        mean = attention_map(q, k, lengths=lengths, mask=mask)
    keep = mask & (torch.arange(6, device=device) < lengths[:, None])
    s = (torch.einsum("bqhd,bkhd->bqhk", q, k).double() / 4).masked_fill(~keep[:, None, None], -torch.inf)
    torch.testing.assert_close(lse.double(), s.logsumexp(-1), rtol=0, atol=2e-6)          # minus infinity where blind
    torch.testing.assert_close(mean.double(), s.softmax(-1).nan_to_num(0).mean(2), rtol=0, atol=1e-6)


def test_heads_may_be_views_of_one_projection(device):
    wide = torch.randn(2, 9, 3, 2, 40, generator=torch.Generator().manual_seed(0)).to(device)
    views = wide.unbind(2)                                                                # strides 480 and 40
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views]              # (B, H, Q, D) in memory
    expanded = [views[0], views[1][:1].expand(2, -1, -1, -1), views[2][:1].expand(2, -1, -1, -1)]
    last = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in views]                # last stride is not 1: copied
    with kernels.use("triton"):
        plain = cross_attention(*(x.contiguous() for x in views))
        for layout in (views, turned, last, (views[0], views[1], views[2].contiguous())):
            assert torch.equal(cross_attention(*layout), plain)
        assert torch.equal(cross_attention(*expanded), cross_attention(*(x.contiguous() for x in expanded)))


def test_the_same_bits_every_time(device):
    inputs = qkv(2, 40, 20, 2, 24, device)
    first, second = (run("triton", torch.float32, cross_attention, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_tile_changes_rounding_only(device, monkeypatch):
    inputs = qkv(1, 40, 20, 1, 24, device)
    plain = run("triton", torch.float32, cross_attention, inputs)
    monkeypatch.setattr(attention, "_tile", lambda *_: (16, 4))
    for programs in 320, 2, 1:                                    # 3 tiles: one each; spans of 2 and of 4, beyond the end
        monkeypatch.setattr(attention, "PROGRAMS", programs)
        for a, b in zip(run("triton", torch.float32, cross_attention, inputs), plain, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6 if device.type == "cpu" else 2e-3)


def test_keys_that_nobody_may_see_change_no_bit(device):
    q, k, v = (x.float() for x in qkv(2, 7, 5, 1, 16, device))
    longer = [torch.cat([x, torch.full_like(x, torch.nan)], 1) for x in (k, v)]           # even NaN: never read
    with kernels.use("triton"):
        plain = cross_attention(q, k, v)
        assert torch.equal(cross_attention(q, *longer, lengths=torch.tensor([5, 5], device=device)), plain)
        assert torch.equal(cross_attention(q, *longer, mask=(torch.arange(10, device=device) < 5).expand(2, -1)), plain)


@pytest.mark.parametrize("path", PATHS)
def test_order_of_keys_does_not_matter_and_weights_sum_to_one(path, device):
    q, k, v = (x.float() for x in qkv(1, 7, 20, 2, 40, device))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).to(device)
    with kernels.use(path):
        torch.testing.assert_close(cross_attention(q, k[:, order], v[:, order]), cross_attention(q, k, v))
        ones = cross_attention(q, k * 30, torch.ones_like(v))
        rows = attention_map(q, k * 30).sum(-1)
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=1e-6 if device.type == "cpu" else 1e-3)
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_scores_of_any_size_stay_finite(path, device):
    q, k, v = (x.float() for x in qkv(1, 5, 6, 1, 16, device))
    with kernels.use(path):
        out = cross_attention(q * 1e4, k * 1e4, v)
    winner = torch.einsum("bqhd,bkhd->bqhk", q, k).argmax(-1)[0, :, 0]
    torch.testing.assert_close(out[0, :, 0], v[0, winner, 0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="float64 products are for the interpreter")
def test_gradients_equal_finite_differences():
    inputs = [x.requires_grad_() for x in qkv(2, 3, 4, 1, 8, "cpu")]
    board = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in
             ((1, 4, 1, 8), (1, 2, 3, 1, 8), (1, 2, 3, 1, 8), (1, 2, 1, 8), (1, 2, 1, 8), (), (1, 4, 1, 8))]
    with kernels.use("triton"):
        ragged = lambda *x: cross_attention(*x, lengths=torch.tensor([4, 2]))  # noqa: E731
        story = lambda *x: frame_story_attention(*x[:6], (1, 2), (2, 2), q_story=x[6])  # noqa: E731
        assert torch.autograd.gradcheck(ragged, inputs, fast_mode=True)
        assert torch.autograd.gradcheck(story, board, fast_mode=True)


def test_a_second_derivative_is_refused(device):
    q, k, v = (x.float().requires_grad_() for x in qkv(1, 3, 4, 1, 8, device))
    with kernels.use("triton"):
        grad, = torch.autograd.grad(cross_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_decides_the_dtype(device):
    q, k, v = (x.float() for x in qkv(1, 3, 4, 1, 16, device))
    for path in PATHS:
        with kernels.use(path), torch.autocast(device.type, torch.bfloat16):
            assert cross_attention(q, k, v.bfloat16()).dtype == torch.bfloat16
            assert frame_story_attention(q, k[:, None], v[:, None], k, v, 0.5, (1, 1), (1, 3)).dtype == torch.bfloat16


# -- frame-story attention ---------------------------------------------------------------------------------------


def slow_frame_story(q, kf, vf, ks, vs, gate, q_story=None, *, cells, board, lengths=None):
    """Token by token: find the cell from row and column, attend to that frame's words, add the story."""
    out = []
    for token in range(q.shape[1]):
        row, column = token // board[1], token % board[1]
        f = row // (board[0] // cells[0]) * cells[1] + column // (board[1] // cells[1])
        own = slow_attention(q[:, token:token + 1], kf[:, f], vf[:, f], None if lengths is None else lengths[:, f])
        out.append(own + gate * slow_attention((q if q_story is None else q_story)[:, token:token + 1], ks, vs))
    return torch.cat(out, 1)


def story_inputs(B, cells, board, K, K2, H, D, device, own_query=False):
    g, F = torch.Generator().manual_seed(3), cells[0] * cells[1]
    shapes = [(B, board[0] * board[1], H, D), (B, F, K, H, D), (B, F, K, H, D), (B, K2, H, D), (B, K2, H, D), ()]
    shapes += [shapes[0]] if own_query else []
    return [torch.randn(s, generator=g, dtype=torch.float64).to(device) for s in shapes]


@pytest.mark.parametrize("cells, board, own_query, ragged", [((1, 1), (3, 5), False, False), ((2, 2), (4, 6), True, False),
                                                             ((2, 2), (6, 10), False, False), ((1, 3), (3, 9), True, True)])
def test_frame_story_equals_a_loop_over_tokens(cells, board, own_query, ragged, device):
    inputs = story_inputs(2, cells, board, 6, 3, 2, 24, device, own_query)
    lengths = torch.tensor([[6, 2, 5], [0, 4, 1]], device=device) if ragged else None

    def ours(*x):
        return frame_story_attention(*x[:6], cells, board, q_story=x[6] if own_query else None, lengths=lengths)

    truth = run("reference", torch.float64, slow_frame_story, inputs, cells=cells, board=board, lengths=lengths)
    exact = run("reference", torch.float64, ours, inputs)
    assert_as_accurate(exact, truth, truth, torch.float64)                    # the reference: cut, two SDPA, paste
    theirs = run("reference", torch.float32, ours, inputs)
    assert_as_accurate(run("triton", torch.float32, ours, inputs), theirs, truth, torch.float32)


def test_frame_story_in_half_precision(device):
    inputs = [x.half().double() for x in story_inputs(1, (2, 2), (8, 8), 20, 8, 2, 40, device)]
    run_story = lambda path, t: run(path, t, lambda *x: frame_story_attention(*x, (2, 2), (8, 8)), inputs)  # noqa: E731
    truth, theirs, ours = (run_story("reference", torch.float64), run_story("reference", torch.half),
                           run_story("triton", torch.half))
    assert_as_accurate(ours[:6], theirs[:6], truth[:6], torch.half)
    # d gate is one number, a sum of 64 x 2 x 40 signed terms: compared on the scale of those terms
    assert abs(float(ours[6] - truth[6])) <= 2e-3 * float(truth[0].norm())


@pytest.mark.parametrize("path", PATHS)
def test_a_closed_gate_leaves_the_frames_and_still_learns(path, device):
    inputs = story_inputs(1, (2, 2), (4, 4), 5, 3, 1, 16, device)
    inputs[5] = torch.zeros((), dtype=torch.float64, device=device)
    with kernels.use(path):
        frames = attention.paste(cross_attention(attention.cut(inputs[0], (2, 2), (4, 4)).float(),
                                                 *(x.flatten(0, 1).float() for x in inputs[1:3])), (2, 2), (4, 4))
    out, _, _, _, dks, dvs, dgate = run(path, torch.float32, lambda *x: frame_story_attention(*x, (2, 2), (4, 4)), inputs)
    torch.testing.assert_close(out, frames.double(), rtol=0, atol=1e-6)
    assert (dks == 0).all() and (dvs == 0).all() and dgate != 0


@pytest.mark.parametrize("path", PATHS)
def test_captions_may_be_shorter_and_the_gate_a_number(path, device):
    q, kf, vf, ks, vs, _ = (x.float() for x in story_inputs(1, (1, 2), (2, 4), 6, 3, 1, 16, device))
    lengths = torch.tensor([[2, 0]], device=device)
    with kernels.use(path):
        short = frame_story_attention(q, kf[:, :, :2], vf[:, :, :2], ks, vs, 0.5, (1, 2), (2, 4))
        out = frame_story_attention(q, kf, vf, ks, vs, 0.5, (1, 2), (2, 4), lengths=lengths)
        story = 0.5 * cross_attention(q, ks, vs)
    left = (torch.arange(8, device=device) % 4) < 2
    torch.testing.assert_close(out[:, left], short[:, left])
    torch.testing.assert_close(out[:, ~left], story[:, ~left])                # no words: the story alone


def test_a_big_board_with_queries_of_its_own_story_takes_the_kernel(device):
    q, kf, ks = (torch.zeros(s, device=device) for s in ((1, 1024, 8, 40), (1, 4, 77, 8, 40), (1, 8, 8, 40)))
    seen = []
    with kernels.use("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention._Attention, "apply", lambda *x: seen.append(x) or x)
        frame_story_attention(q, kf, kf, ks, ks, 1.0, (2, 2), (32, 32), q_story=q)
    assert len(seen) == 1


def test_cut_and_paste_are_inverse_and_row_by_row():
    x = torch.arange(24.0).view(1, 24, 1, 1)                                  # a board of 4 x 6 tokens
    pieces = attention.cut(x, (2, 2), (4, 6))
    assert pieces[1].flatten().tolist() == [3, 4, 5, 9, 10, 11]               # upper right cell
    assert torch.equal(attention.paste(pieces, (2, 2), (4, 6)), x)


@kernels.jit
def _probe(x, out, sample, stride):
    tl.store(out, _start(x, sample + tl.program_id(0), stride, 0, 0, 0, 0, 8).to(tl.int64) - x.to(tl.int64))  # noqa: F821


def test_offsets_beyond_two_to_the_31_do_not_wrap(device):
    x, out = torch.zeros(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    _probe[(1,)](x, out, 70_000, 40_000)                                      # 70,000 samples of 320,000 elements each
    assert out.item() == 70_000 * 40_000 * 8 * 4                              # bytes; nothing of that size is touched


@pytest.mark.gpu
@pytest.mark.slow
def test_a_batch_beyond_two_to_the_31_numbers():
    B, Q = 1100, 4096                                                         # 2.3e9 numbers, 4.6 GB; its gradient as much
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    q = torch.randn(B, Q, 8, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    k, v = (torch.randn(B, 20, 8, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    with kernels.use("triton"):
        out = cross_attention(q, k, v)
        grad, = torch.autograd.grad(out, q, q.detach())
        last = q[-1:].detach().clone().requires_grad_()
        alone = cross_attention(last, k[-1:], v[-1:])
        assert torch.equal(out[-1:], alone) and torch.equal(grad[-1:], torch.autograd.grad(alone, last, last.detach())[0])


# -- which tile, which precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("capability, dtype, width, keys, kind, tile", [
    ((8, 0), torch.half, 80, 77, "backward", (16, 8)), ((8, 6), torch.half, 80, 77, "backward", None),      # 108 KiB: 8.0 only
    ((8, 9), torch.float32, 32, 77, "backward", None), ((9, 0), torch.float32, 32, 77, "backward", (16, 8)),
    ((12, 0), torch.half, 40, 77, "forward", (64, 4)), ((10, 0), torch.half, 160, 77, "forward", (64, 8)),
    ((9, 0), torch.half, 160, 77, "backward", None), ((9, 0), torch.half, 40, 200, "story", None),
    ((9, 0), torch.float32, 40, 200, "forward", None), ((8, 0), torch.bfloat16, 40, 200, "forward", (32, 8)),
    ((9, 0), torch.half, 300, 77, "forward", None)])
def test_every_chip_takes_its_own_tile_or_the_reference(capability, dtype, width, keys, kind, tile, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    x = torch.empty(1, width, dtype=dtype)
    gpu = SimpleNamespace(is_cuda=True, device="cuda", shape=x.shape, element_size=x.element_size)
    assert attention._tile(kind, gpu, keys) == tile


def test_training_without_a_backward_tile_is_refused_in_words(monkeypatch):
    q = torch.ones(1, 2, 1, 8)
    monkeypatch.setattr(attention, "_tile", lambda kind, *_: None if kind == "backward" else (64, 4))
    with kernels.use("triton"):
        assert cross_attention(q, q, q).shape == q.shape
        with pytest.raises(ValueError, match="no backward tile for width 8, 2 keys, torch.float32 on this GPU"):
            cross_attention(q, q, q.requires_grad_())


@pytest.mark.parametrize("dtype, allowed, precision", [(torch.float32, False, "tf32x3"), (torch.float32, True, "tf32"),
                                                       (torch.float16, True, "ieee")])
def test_float32_is_three_products_unless_one_is_allowed(dtype, allowed, precision):
    before = torch.backends.cuda.matmul.allow_tf32           # not an attribute that monkeypatch could put back
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        assert attention._launch("forward", torch.ones(1, 2, 1, 8, dtype=dtype), 2, 1.0)[1]["PRECISION"] == precision
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# -- what must not happen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("B, Q, K", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_inputs_give_empty_outputs_or_zeros(path, B, Q, K, device):
    inputs = qkv(B, Q, K, 2, 16, device)
    out, *grads = run(path, torch.float32, cross_attention, inputs)
    assert out.shape == (B, Q, 2, 16) and not out.any() and not any(g.any() for g in grads)
    with kernels.use(path):
        assert attention_map(inputs[0], inputs[1]).shape == (B, Q, K)
    story = [inputs[0], inputs[1][:, None], inputs[2][:, None], inputs[1], inputs[2]]
    if Q:
        assert not run(path, torch.float32, lambda *x: frame_story_attention(*x, 1.0, (1, 1), (1, Q)), story)[0].any()


BAD = {
    "first tensor must be floating point .*torch.int32": lambda q: cross_attention(q.int(), q, q),
    "B, Q, H, D": lambda q: cross_attention(q[0], q, q),
    r"k is \(2, 4, 1, 4\), but the first tensor .* asks for \(2, 4, 1, 8\)": lambda q: cross_attention(q, q[..., :4], q[..., :4]),
    r"v is \(2, 2, 1, 8\), but .* asks for \(2, 4, 1, 8\)": lambda q: cross_attention(q, q, q[:, :2]),
    "k is torch.float16 on .*, the first tensor torch.float32": lambda q: cross_attention(q, q.half(), q),
    "on meta": lambda q: cross_attention(q, q.to("meta"), q),
    "lengths must be integers": lambda q: cross_attention(q, q, q, lengths=torch.ones(2, device=q.device)),
    "must be integers \\(2,\\)": lambda q: cross_attention(q, q, q, lengths=torch.ones(3, dtype=int, device=q.device)),
    "got torch.bool \\(2,\\)": lambda q: cross_attention(q, q, q, lengths=torch.ones(2, dtype=bool, device=q.device)),
    "got torch.complex64": lambda q: cross_attention(q, q, q, lengths=torch.ones(2, dtype=torch.cfloat, device=q.device)),
    "lengths must be integers \\(2, 1\\)": lambda q: frame_story_attention(q, q[:, None], q[:, None], q, q, 1.0, (1, 1), (2, 2),
                                                                        lengths=torch.ones(2, dtype=int, device=q.device)),
    "scale is a number, not a tensor": lambda q: cross_attention(q, q, q, scale=torch.ones((), requires_grad=True)),
    "two numbers each": lambda q: frame_story_attention(q, q[:, None], q[:, None], q, q, 1.0, (1,), (2, 2)),
    "mask must be bool": lambda q: cross_attention(q, q, q, mask=torch.ones(2, 4, device=q.device)),
    "True where a key may be seen": lambda q: attention_map(q, q, mask=torch.ones(2, 1, 1, 4).bool().to(q.device)),
    "divide it evenly": lambda q: frame_story_attention(q, q[:, None], q[:, None], q, q, 1.0, (3, 1), (2, 2)),
    "h w = 2 x 3": lambda q: frame_story_attention(q, q[:, None], q[:, None], q, q, 1.0, (1, 1), (2, 3)),
    r"kf is \(2, 1, 4, 1, 8\), but .* asks for \(2, 4, 4, 1, 8\)":
        lambda q: frame_story_attention(q, q[:, None], q[:, None], q, q, 1.0, (2, 2), (2, 2)),
    "gate must be one number": lambda q: frame_story_attention(q, q[:, None], q[:, None], q, q, torch.ones(2), (1, 1), (2, 2)),
    r"q_story is \(1, 4, 1, 8\), but": lambda q: frame_story_attention(q, q[:, None], q[:, None], q, q, 1.0, (1, 1), (2, 2),
                                                                       q_story=q[:1]),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_is_answered_with_a_sentence(sentence, path, device):
    with kernels.use(path), pytest.raises(ValueError, match=sentence):
        BAD[sentence](torch.zeros(2, 4, 1, 8, device=device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="lengths on a GPU are clamped: checking would wait for it")
def test_lengths_beyond_the_keys_are_named():
    q = torch.zeros(2, 4, 1, 8)
    with pytest.raises(ValueError, match=r"lengths \[4, 5\] must lie in 0 .. 4"):
        cross_attention(q, q, q, lengths=torch.tensor([4, 5]))


@pytest.mark.parametrize("change, reason", [
    (lambda q, k: (q.expand(-1, 2 ** 28, -1, -1), k), "2\\*\\*31 elements"),
    (lambda q, k: (q.expand(-1, 16 * kernels.GRID + 1, -1, -1), k), "1,048,560 queries"),
    (lambda q, k: (q, k.expand(-1, 300, -1, -1)), "300 keys of width 8 do not fit"),
    (lambda q, k: (q.expand(-1, -1, -1, 300), k.expand(-1, -1, -1, 300)), "1 keys of width 300 do not fit"),
])
def test_what_the_kernel_cannot_take_is_refused_in_words(change, reason, device):
    q, k = change(torch.zeros(1, 1, 1, 1 if "width 300" in reason else 8, device=device),
                  torch.zeros(1, 1, 1, 1 if "width 300" in reason else 8, device=device))
    with kernels.use("triton"), pytest.raises(ValueError, match=reason):
        cross_attention(q, k, k)
