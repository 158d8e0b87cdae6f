"""CLIP as a frozen part of other models: pictures and sentences to vectors, and what GALIP does with its blocks.

    clip = small()                                   # trained on the built-in world, shipped in data/weights/
    clip = load("ViT-B-32.pt")                       # or OpenAI's, a plain state dict, Hugging Face's layout
    features, embedding = clip.encode_image(standard(pictures, clip.size), taps=(1, 2))
    sentence, words = clip.encode_text(small_tokeniser()(["a red star"]))

The towers are in data/towers.py. Every size but the number of heads is read from the state dict. OpenAI's text tower
lies at the root of the state dict, ours in `text.`. Embeddings are NOT normalised.
"""
import re
import zipfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from data.safe import DAMAGED, damage, reason
from data.text import WordTokenizer
from data.towers import ImageTower, TextTower
from data.weights import load_checked, read_safetensors, read_state, sha256

VIT_B_32 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"   # SHA-256 of the released file
SMALL = Path(__file__).parent / "weights" / "clip-small.safetensors"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)     # of RGB in [0, 1]
HEAD_WIDTH = 64          # OpenAI's files do not store the number of heads: it is width / 64 in both towers


# -- pictures into CLIP's range ------------------------------------------------------------------------------


def normalise(pictures):
    """[0, 1] -> zero mean, unit variance as in CLIP's training set."""
    mean, std = (pictures.new_tensor(v)[:, None, None] for v in (MEAN, STD))
    return (pictures - mean) / std


def standard(pictures, size=224):
    """CLIP's own preparation: short side to `size` (bicubic), centre crop, [0, 1], mean and std.

    pictures (B, 3, H, W) in [-1, 1] -> (B, 3, size, size). Differentiable; bicubic overshoot is not clamped, so that
    a generator keeps its gradient. Official code: resizes with Pillow, hence 8-bit rounding and clamping.
    """
    h, w = pictures.shape[-2:]
    if (h, w) != (size, size):
        scale = size / min(h, w)
        h, w = max(size, round(h * scale)), max(size, round(w * scale))
        pictures = F.interpolate(pictures, size=(h, w), mode="bicubic", antialias=True, align_corners=False)
        top, left = (h - size) // 2, (w - size) // 2
        pictures = pictures[..., top : top + size, left : left + size]
    return normalise(pictures / 2 + 0.5)


def galip_compat(pictures, size=224):
    """What GALIP's released code feeds CLIP: nearest resize, and the range squeezed once too often, into [0.5, 1].

    Official code: x / 2 + 1/2 is already in [0, 1], then (x + 1) / 2 follows; it looks like an accident, yet training
    and the reported CLIP score both use it. Needed with the authors' critic; for anything new take `standard`.
    """
    pictures = F.interpolate(pictures / 2 + 0.5, size=(size, size))
    return normalise((pictures + 1) / 2)


# -- the model -----------------------------------------------------------------------------------------------


class CLIP(nn.Module):
    """Both towers and the temperature. logits = exp(logit_scale) cos(image, text)."""

    def __init__(self, image, text):
        super().__init__()
        self.visual, self.text = image, text
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.size, self.grid, self.width = image.size, image.grid, image.width
        self.embed, self.context = image.proj.shape[1], text.context

    def encode_image(self, x, taps=()):
        """Pictures as `standard` prepares them -> features (B, len(taps), w, g, g), embedding (B, E).

        Tap i is the output of block i (0-based), class token dropped, patches folded row by row. Call it under
        no_grad for real pictures, with gradients for generated ones: frozen weights let them through to the pixels.
        """
        return self.visual(x, taps)

    def encode_text(self, tokens):
        """ids (B, T) -> sentence (B, E), words (B, T, width of the text tower): ln_final of every position."""
        return self.text(tokens)

    def map_tokens(self, feature, prompts, prompt_layers):
        """GALIP's mapper (B, w, g, g) -> (B, w, g, g); see ImageTower.map_tokens."""
        return self.visual.map_tokens(feature, prompts, prompt_layers)


def freeze(model):
    """No gradients for the weights, though still through them."""
    return model.requires_grad_(False).eval()


def small():
    """The small CLIP of the built-in world (64 x 64 pictures), frozen. Its words: `small_tokeniser()`."""
    return load(SMALL)


def small_tokeniser():
    """The word table that the shipped weights were trained with; it travels in their file."""
    state, metadata = read_safetensors(SMALL)
    return WordTokenizer(metadata["words"].split(), context=len(state["positional_embedding"]))


# -- weights -------------------------------------------------------------------------------------------------


def load(path, heads=(None, None), trust=False):
    """CLIP (or a lone TextTower) from a file or a Hugging Face folder, frozen, float32; `.sha256` says which file.

    heads   (image, text), for towers whose heads are not 64 wide
    trust   allow a TorchScript archive that is not OpenAI's ViT-B-32.pt
    raises  FileNotFoundError or ValueError: what is missing, what does not fit, what to do
    """
    path = Path(path)
    if path.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds neither {' nor '.join(names)}: not a Hugging Face folder of CLIP")
        path = found[0]
    state, metadata = (read_torchscript(path, trust), {}) if is_torchscript(path) else read_state(path)
    if "image_heads" in metadata:
        with damage(path, "does not say how many heads its towers have"):
            heads = int(metadata["image_heads"]), int(metadata["text_heads"])
    model = from_official(state, heads, path)
    model.sha256 = sha256(path)
    return model


def from_official(state, heads=(None, None), where="the state dict"):
    """CLIP, or only a TextTower, with a state dict in OpenAI's or Hugging Face's names; frozen, float32."""
    dropped = ("input_resolution", "context_length", "vocab_size")          # bookkeeping of the released file
    state = {name: t for name, t in state.items() if name not in dropped and not name.endswith("position_ids")}
    if any(".encoder.layers." in f".{name}" for name in state):
        state = from_hugging_face(state, where)
    image = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.")}
    text = {name: t for name, t in state.items() if not name.startswith("visual.")}
    try:
        with torch.device("meta"):                                          # sizes only: the weights follow
            model = text_tower(text, heads[1])
            model = CLIP(image_tower(image, heads[0]), model) if image else model
    except (KeyError, AttributeError, IndexError, RuntimeError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{where} is not a CLIP with a vision transformer: {error} is missing or has another shape; "
                         f"its first names are {', '.join(sorted(state)[:4])}") from error
    if image:                                                               # a lone text tower has no prefix
        state = {n if n.startswith("visual.") or n == "logit_scale" else f"text.{n}": t for n, t in state.items()}
    return freeze(load_checked(model.to_empty(device="cpu"), state, where))


def official_names(model):
    """The state dict of a CLIP under OpenAI's names (302 entries at ViT-B/32's depth)."""
    return {name.removeprefix("text."): tensor for name, tensor in model.state_dict().items()}


def image_tower(state, heads=None):
    """An image tower of the sizes of a state dict (OpenAI's names without `visual.`)."""
    width, _, _, patch = state["conv1.weight"].shape
    grid = round((len(state["positional_embedding"]) - 1) ** 0.5)
    return ImageTower(width, depth(state), heads_of(width, heads, "image"), patch, grid, state["proj"].shape[1])


def text_tower(state, heads=None):
    """A text tower of the sizes of a state dict; no projection if the state dict has none."""
    vocabulary, width = state["token_embedding.weight"].shape
    embed = state["text_projection"].shape[1] if "text_projection" in state else 0
    context = len(state["positional_embedding"])
    return TextTower(width, depth(state), heads_of(width, heads, "text"), context, vocabulary, embed)


def depth(state):
    """How many blocks the names count."""
    return sum(bool(re.fullmatch(r"transformer\.resblocks\.\d+\.attn\.in_proj_weight", name)) for name in state)


def heads_of(width, heads, which):
    """raises ValueError where nobody says how many heads there are"""
    if heads or width % HEAD_WIDTH == 0:
        return heads or width // HEAD_WIDTH
    raise ValueError(f"the file does not say how many heads the {which} tower has and its width {width} is not a "
                     f"multiple of {HEAD_WIDTH}; pass heads=(image, text)")


HUGGING_FACE = (    # their word, ours; applied in this order; "pre_layrnorm" is misspelt there. UNVERIFIED: from memory
    ("self_attn.out_proj", "attn.out_proj"), ("final_layer_norm", "ln_final"), ("pre_layrnorm", "ln_pre"),
    ("post_layernorm", "ln_post"), ("layer_norm", "ln_"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
    ("embeddings.patch_embedding", "conv1"), ("embeddings.class_embedding", "class_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("embeddings.token_embedding", "token_embedding"), ("encoder.layers", "transformer.resblocks"),
)


def from_hugging_face(state, where):
    """`clip-vit-base-patch32`, or a `text_encoder` with or without its prefix -> OpenAI's names.

    q, k, v projections are stacked in that order; the two output projections are transposed.
    """
    renamed, parts = {}, {}
    for name, tensor in state.items():
        if name in ("visual_projection.weight", "text_projection.weight"):
            renamed["visual.proj" if name[0] == "v" else "text_projection"] = tensor.T
            continue
        new = re.sub(r"^vision_model\.", "visual.", name.removeprefix("text_model."))
        for theirs, ours in HUGGING_FACE:
            new = new.replace(theirs, ours)
        if match := re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", new):
            parts.setdefault(f"{match[1]}.attn.in_proj_{match[3]}", {})[match[2]] = tensor
        else:
            renamed[new] = tensor
    for name, three in parts.items():
        if sorted(three) != ["k", "q", "v"]:
            raise ValueError(f"{where} is incomplete: {name} needs q_proj, k_proj and v_proj, found {', '.join(sorted(three))}")
        renamed[name] = torch.cat([three[part] for part in "qkv"])
    return renamed


def is_torchscript(path):
    """A zip archive with a folder of code is TorchScript; torch.save makes zip archives too, without code."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.split("/")[1:2] in (["code"], ["constants.pkl"]) for name in archive.namelist())
    except DAMAGED:                                                          # no archive, or a damaged one
        return False


def read_torchscript(path, trust=False):
    """State dict of a TorchScript archive, the form in which OpenAI released CLIP.

    torch.jit.load is not a weights-only reader: an archive is a program. The released ViT-B-32.pt is known by its
    SHA-256; any other one needs trust=True.
    """
    digest = sha256(path)
    if digest != VIT_B_32 and not trust:
        raise ValueError(f"{path} is a TorchScript archive, which is a program, and not the released ViT-B-32.pt "
                         f"(SHA-256 {digest}); if you know where it comes from, load it with trust=True")
    try:
        return torch.jit.load(str(path), map_location="cpu").state_dict()
    except RuntimeError as error:
        raise ValueError(f"{path} is a damaged TorchScript archive ({reason(error)})") from error
