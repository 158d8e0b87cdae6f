"""Attribution maps: Triton kernels (interpreted without a GPU) and references against loops, autograd and interpolate."""
import math

import pytest
import torch
from torch.nn import functional as F

import kernels
from kernels.attribution import COLOURS, cosine_map, grad_cam, scale_to_one, show, word_maps
from tests.test_kernels_attention import poison  # noqa: F401  (fills torch.empty with NaN)

PATHS = ["reference", "triton"]


def draw(*shape, device, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def on_both(function, *arguments, **options):
    outs = []
    for path in PATHS:
        with kernels.use(path):
            outs.append(function(*arguments, **options))
    return outs


@pytest.mark.parametrize("B, P, D", [(1, 1, 1), (3, 49, 200), (2, 17, 128)])
def test_cosine_map_equals_a_loop(B, P, D, device):
    z, target = draw(B, P, D, device=device), draw(B, D, device=device, seed=1)
    z[0, 0] = 0                                                               # a zero vector: cosine 0
    for got in on_both(cosine_map, z, target):
        for b in range(B):
            for p in range(P):
                a, t = z[b, p].double(), target[b].double()
                expected = 0.0 if not a.any() else float(a @ t / a.norm() / t.norm())
                assert float(got[b, p]) == pytest.approx(expected, abs=3e-7)


def test_cosine_map_of_a_hand_made_grid(device):
    z = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [0.0, -2.0], [0.0, 0.0]]], device=device)
    for got in on_both(cosine_map, z, torch.tensor([[2.0, 0.0]], device=device)):
        torch.testing.assert_close(got[0].cpu(), torch.tensor([1.0, 0.6, 0.0, 0.0]))


@pytest.mark.parametrize("B, C, h, w", [(1, 1, 1, 1), (2, 70, 7, 9), (1, 40, 16, 16), (1, 9, 20, 20)])
def test_grad_cam_equals_the_definition(B, C, h, w, device):
    activation, gradient = draw(B, C, h, w, device=device), draw(B, C, h, w, device=device, seed=1)
    truth = torch.zeros(B, h, w, dtype=torch.float64, device=device)
    for b in range(B):
        for c in range(C):
            truth[b] += gradient[b, c].double().mean() * activation[b, c].double()
    for got in on_both(grad_cam, activation, gradient):
        torch.testing.assert_close(got.double(), truth.clamp(min=0), rtol=0, atol=1e-6)


def test_channel_weights_are_the_derivative_of_the_score(device):
    """Finite differences: raising channel c everywhere by e raises the score by e * places * weight_c."""
    activation, vector = draw(1, 6, 4, 4, device=device).double(), draw(6, device=device, seed=1).double()

    def score(a):
        return F.cosine_similarity(a.mean((2, 3))[0], vector, dim=0)

    gradient, = torch.autograd.grad(score(activation.requires_grad_()), activation)
    activation = activation.detach()
    weight = torch.stack([(score(activation + 1e-5 * (torch.arange(6, device=device) == c).view(1, 6, 1, 1))
                           - score(activation)) / 1e-5 / 16 for c in range(6)])
    expected = (weight.view(1, 6, 1, 1) * activation).sum(1).clamp(min=0).float()
    for got in on_both(grad_cam, activation, gradient):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("h, w, H, W", [(7, 7, 37, 65), (4, 4, 8, 8), (16, 5, 64, 20), (1, 1, 9, 9), (33, 4, 16, 16),
                                        (6, 6, 6, 6)])
def test_maps_are_enlarged_as_interpolate_does(h, w, H, W, device):
    heat, image = draw(2, h, w, device=device), draw(2, 3, H, W, device=device, seed=1).clamp(-1, 1)
    for normalise in ("minmax", "max", "none"):
        low = {"minmax": heat.amin((1, 2), keepdim=True)}.get(normalise, torch.zeros(2, 1, 1, device=device)).double()
        high = torch.ones_like(low) if normalise == "none" else heat.amax((1, 2), keepdim=True).double()
        unit = ((heat.double() - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        truth = F.interpolate(unit[:, None], (H, W), mode="bilinear", align_corners=False)[:, 0]
        for path in PATHS if normalise == "minmax" else PATHS[1:]:
            with kernels.use(path):
                got, picture = show(heat, image, alpha=0.25, normalise=normalise)
            torch.testing.assert_close(got.double(), truth, rtol=0, atol=1.5e-6)
            assert got.min() >= 0 and got.max() <= 1                          # exactly: weights may add up to 1 + 1e-7
            torch.testing.assert_close(picture, paint(got, image, 0.25), rtol=0, atol=1e-5)


def paint(values, image, alpha):
    """The colour map pixel by pixel: on the straight line between the two anchors around the value."""
    table = torch.tensor(COLOURS, device=image.device)
    place = values.clamp(0, 1) * (len(table) - 1)
    low = place.floor().clamp(max=len(table) - 2).long()
    colour = torch.lerp(table[low], table[low + 1], (place - low)[..., None]).permute(0, 3, 1, 2)
    return (1 - alpha) * image + alpha * (2 * colour - 1)


def test_from_gradients_to_picture_in_one_call(device):
    activation, gradient = draw(2, 40, 7, 5, device=device), draw(2, 40, 7, 5, device=device, seed=1)
    image = draw(2, 3, 24, 70, device=device, seed=2).clamp(-1, 1)
    for path in PATHS:
        with kernels.use(path):
            whole, steps = show((activation, gradient), image), show(grad_cam(activation, gradient), image)
        for a, b in zip(whole, steps, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_flat_and_negative_maps_have_a_defined_answer(device):
    image = torch.zeros(1, 3, 8, 8, device=device)
    for path in PATHS:
        with kernels.use(path):
            assert not show(torch.full((1, 4, 4), 3.0, device=device), image)[0].any()                    # constant: 0
            assert not show(-torch.ones(1, 4, 4, device=device), image, normalise="max")[0].any()         # all negative: 0
            assert show(-torch.rand(1, 4, 4, device=device), image)[0].max() > 0.5                        # minmax: relative
            assert not grad_cam(torch.ones(1, 2, 4, 4, device=device), -torch.ones(1, 2, 4, 4, device=device)).any()
            assert not show((torch.ones(1, 2, 4, 4, device=device), -torch.ones(1, 2, 4, 4, device=device)), image)[0].any()


def test_a_constant_keeps_its_sum_when_enlarged(device):
    image = torch.zeros(1, 3, 23, 31, device=device)
    for got, _ in on_both(show, torch.full((1, 5, 7), 0.75, device=device), image, normalise="none"):
        assert float(got.sum()) == pytest.approx(0.75 * 23 * 31, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.slow
def test_batches_beyond_two_to_the_31_numbers():
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free GPU memory")
    z = torch.randn(2 ** 20 + 1, 1, 2048, device="cuda", dtype=torch.bfloat16)               # 4.3 GB
    maps = z.view(-1, 2, 32, 32)
    image = torch.zeros(len(maps), 3, 32, 32, device="cuda", dtype=torch.bfloat16)
    with kernels.use("triton"):
        torch.testing.assert_close(cosine_map(z, z[:, 0])[-1], torch.ones(1, device="cuda"))
        assert torch.equal(grad_cam(maps, maps)[-1:], grad_cam(maps[-1:], maps[-1:]))
        assert torch.equal(show((maps, maps), image)[1][-1:], show((maps[-1:], maps[-1:]), image[-1:])[1])


@pytest.mark.parametrize("path", PATHS)
def test_word_maps_sum_attention_over_heads(path, device):
    q, k = draw(2, 12, 2, 16, device=device), draw(2, 5, 2, 16, device=device, seed=1)
    with kernels.use(path):
        maps = word_maps(q, k, (3, 4), lengths=torch.tensor([5, 2], device=device))
    assert maps.shape == (2, 5, 3, 4) and not maps[1, 2:].any()                                           # padding: 0
    torch.testing.assert_close(maps.sum(1), torch.full((2, 3, 4), 2.0, device=device))                    # heads
    s = torch.einsum("hd,khd->hk", q[0, 6].double(), k[0].double()) / math.sqrt(16)                       # row 1, column 2
    torch.testing.assert_close(maps[0, :, 1, 2].double(), s.softmax(-1).sum(0), rtol=0, atol=1e-6)
    assert 0 <= scale_to_one(maps.flatten(0, 1)).min() and scale_to_one(maps.flatten(0, 1)).max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pictures_keep_their_dtype(dtype, device):
    image = draw(1, 3, 16, 16, device=device).clamp(-1, 1)
    exact = show(draw(1, 4, 4, device=device), image)[1]
    for heat, picture in on_both(show, draw(1, 4, 4, device=device), image.to(dtype)):
        assert heat.dtype == torch.float32 and picture.dtype == dtype
        torch.testing.assert_close(picture.float(), exact, rtol=0, atol=2e-2)
    activation = draw(1, 8, 4, 4, device=device).to(dtype)
    first, second = on_both(grad_cam, activation, activation)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)                          # products and sums are float32


def test_the_same_bits_every_time_and_for_any_layout(device):
    activation, gradient = draw(1, 70, 7, 7, device=device), draw(1, 70, 7, 7, device=device, seed=1)
    image = draw(1, 3, 20, 20, device=device).clamp(-1, 1)
    last = [x.to(memory_format=torch.channels_last) for x in (activation, gradient, image)]
    with kernels.use("triton"):
        results = [show((activation, gradient), image), show((activation, gradient), image), show(last[:2], last[2])]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_empty_batches_stay_empty(path, device):
    with kernels.use(path):
        assert cosine_map(torch.zeros(0, 4, 8, device=device), torch.zeros(0, 8, device=device)).shape == (0, 4)
        assert grad_cam(torch.zeros(0, 4, 3, 3, device=device), torch.zeros(0, 4, 3, 3, device=device)).shape == (0, 3, 3)
        heat, picture = show(torch.zeros(0, 4, 4, device=device), torch.zeros(0, 3, 8, 8, device=device))
    assert heat.shape == (0, 8, 8) and picture.shape == (0, 3, 8, 8)


BAD = {
    r"target is \(2, 4, 4\), but the first tensor \(B, P, D\) .* asks for \(2, 4\)": lambda x: cosine_map(x[:, 0], x[:, 0]),
    "target is torch.float64 on .*, the first tensor torch.float32": lambda x: cosine_map(x[:, 0], x[:, 0, 0].double()),
    r"gradient is \(2, 1, 4, 4\), but .* asks for \(2, 3, 4, 4\)": lambda x: grad_cam(x, x[:, :1]),
    r"first tensor must be floating point \(B, C, h, w\), got torch.int32": lambda x: grad_cam(x.int(), x.int()),
    "heat must be \\(B, h, w\\)": lambda x: show(x, x),
    "one of minmax, max, none": lambda x: show(x[:, 0], x, normalise="softmax"),
    "alpha=2 must be": lambda x: show(x[:, 0], x, alpha=2),
    "heat is torch.float32 on .*the image's device, meta": lambda x: show(x[:, 0], x.to("meta")),
    "3 x 3 tokens of the board": lambda x: word_maps(x, x, (3, 3)),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_is_answered_with_a_sentence(sentence, path, device):
    with kernels.use(path), pytest.raises(ValueError, match=sentence):
        BAD[sentence](torch.zeros(2, 3, 4, 4, device=device))


def test_what_the_kernel_cannot_take_is_refused_in_words(device):
    with kernels.use("triton"):
        with pytest.raises(ValueError, match="more than 64 x 64"):
            show(torch.zeros(1, 65, 4, device=device), torch.zeros(1, 3, 8, 8, device=device))
        with pytest.raises(ValueError, match="2\\*\\*31 elements"):                  # a view: no memory behind it
            cosine_map(torch.zeros(1, 1, 1, device=device).expand(1, 2 ** 16, 2 ** 15),
                       torch.zeros(1, 1, device=device).expand(1, 2 ** 15))
        with pytest.raises(ValueError, match="65,536 tiles, a grid holds 65,535"):   # one over: 512 x 128 tiles
            show(torch.zeros(1, 4, 4, device=device), torch.zeros(1, 1, 1, 1, device=device).expand(1, 3, 2 ** 13, 2 ** 13))
        with pytest.raises(ValueError, match="a grid holds 65,535"):
            cosine_map(torch.zeros(1, 1, 1, device=device).expand(1, 2 ** 20, 1), torch.zeros(1, 1, device=device))
        with pytest.raises(ValueError, match="more than 1,024 places"):
            grad_cam(torch.zeros(1, 1, 40, 40, device=device), torch.zeros(1, 1, 40, 40, device=device))
