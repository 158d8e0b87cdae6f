"""Spoilt pictures: what to change and what to keep, learnt from pictures and sentences alone (ours, not in the paper).

    spoilt = spoil(pictures, generator(0))                   # all places of one hue take another picture's colour

Asked for what was true of a picture before it was spoilt, the editor has to give the picture back. That is an edit whose
result is known although nobody made it: change one thing as the sentence says, keep all else. No scene, mask or attribute of
the built-in world is used, so it serves any picture.
"""
import torch

THINGS = 4                    # of so many pictures all but one lose their most unusual hue; a hue of the other is drawn


def spoil(pictures, rng, near=0.2, tries=16):
    """Give all places of one hue in picture i the colour of such a hue in picture i + 4.   (B, 3, S, S) in [-1, 1] -> the same

    A place is drawn, or of 16 the one least like the picture's median: mostly the background, or mostly a thing on it. All
    that lies within `near` of its hue is spoilt, half of that wholly; shades stay, so that textures and shadows do too.
    """
    rows, light = torch.arange(len(pictures)), pictures.mean(1, keepdim=True)
    tint = torch.cat([pictures - light, 0.2 * light], dim=1)                         # (B, 4, S, S) hue, and a little light
    flat = tint.flatten(2)
    places = torch.randint(flat.shape[2], (len(rows), tries), generator=rng).to(pictures.device)
    drawn = flat.gather(2, places[:, None].expand(-1, 4, -1))                        # (B, 4, tries)
    unlike = (drawn - flat.median(2, keepdim=True).values).square().sum(1).argmax(1)
    chosen = drawn[rows, :, torch.where(rows % THINGS == 0, 0, unlike.cpu())]        # (B, 4)
    far = (tint - chosen[..., None, None]).norm(dim=1, keepdim=True)
    share = (2 - far / near).clamp(0, 1)                                             # (B, 1, S, S), 1 where it is spoilt
    colour = ((pictures * share).sum((2, 3)) / share.sum((2, 3)))[..., None, None]   # (B, 3, 1, 1) mean of what is spoilt
    other = colour.roll(-THINGS if len(rows) > THINGS else -1, 0)
    return (pictures + share * (other - colour)).clamp(-1, 1)


def most_hurt(before, after, least=1.0):
    """Which true sentence a picture no longer deserves.   before, after: CLIP's logits of pairs (T, 2, B), true and false

    -> (B,) the pair whose true sentence lost most against its false one, (B,) whether it lost more than `least`
    """
    true, false = (before - after).unbind(1)
    lost, pair = (true - false).max(0)
    return pair, lost > least


def restored(back, source, spoilt, elsewhere=1.0):
    """L1 to the picture before it was spoilt: mean where it was spoilt plus `elsewhere` times the mean of all else.   -> (B,)"""
    error, inside = (back - source).abs().mean(1), ((spoilt - source).abs().amax(1) > 0.02).to(back)                # (B, S, S)
    here, there = ((error * part).sum((1, 2)) / part.sum((1, 2)).clamp(min=1) for part in (inside, 1 - inside))
    return here + elsewhere * there
