"""Models that call the kernels train to the same weights on either path (the recommenders' and GALIP's tests do it too)."""
import pytest
import torch

import kernels
from edit.model import Generator
from story.storyimager import FrameStoryAttention, Story, tuned_unet


def editor(t):
    """A picture and a sentence through DE-Net's generator, batch t."""
    g = torch.Generator().manual_seed(t)
    image, sentence = torch.rand(1, 3, 8, 8, generator=g), torch.randn(1, 6, generator=g)
    return lambda model: model(image.double(), sentence.double())


def board(t):
    """A noisy board of two by two frames through StoryImager's UNet, batch t."""
    g = torch.Generator().manual_seed(t)
    z, words, context = (torch.randn(shape, generator=g).double() for shape in ((1, 4, 8, 8), (1, 4, 5, 12), (1, 3, 12)))
    return lambda model: model(z, torch.tensor([500]), Story(words, context, (2, 2)))


MODELS = {"DE-Net": (lambda: Generator(8, 6, 4, 6), editor),
          "StoryImager": (lambda: tuned_unet(rank=2, alpha=2, channels=4, widths=(8, 16), attention=(False, False), resnets=1,
                                             heads=1, context=12, groups=4), board)}


@pytest.mark.parametrize("name", MODELS)
def test_kernels_on_equal_kernels_off_over_thirty_steps(name):
    make, batch = MODELS[name]

    def train(path):
        torch.manual_seed(0)
        model = make().double()                               # Adam divides tiny gradients by themselves: float32 noise
        adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        with kernels.use(path):
            for t in range(30):
                adam.zero_grad()
                batch(t)(model).square().mean().backward()
                adam.step()
        return list(model.parameters())

    if name == "StoryImager":
        assert sum(isinstance(m, FrameStoryAttention) for m in make().modules()) == 1

    for a, b in zip(train("triton"), train("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
