"""CLIP in plain PyTorch: OpenAI's two towers at any size, and what GALIP does with them (Radford et al., ICML 2021).

    image tower   picture -> patches + class token -> blocks -> embedding; taps: the patch tokens after chosen blocks
    text tower    token ids -> causal blocks -> words; the row at end-of-text -> sentence embedding
    map_tokens    GALIP: made-up patch tokens through the frozen blocks, one prompt token added at chosen ones

`small()` is the one trained on the built-in world and shipped in data/weights/; `load(path)` reads OpenAI's
ViT-B-32.pt, a plain state dict or the Hugging Face layout. Names inside the image tower are OpenAI's; their text tower
lies at the root of the state dict, ours in `text.`. Every size but the number of heads is read from the state dict.
Embeddings are NOT normalised. Shape letters: B batch, T text tokens, N = 1 + g g image tokens, w width, E embedding.
"""
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from data.weights import load_checked, read_safetensors, read_state, sha256

VIT_B_32 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"   # SHA-256 of the released file
SMALL = Path(__file__).parent / "weights" / "clip-small.safetensors"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)    # of RGB in [0, 1]
HEAD_WIDTH = 64          # OpenAI's files do not store the number of heads: it is width / 64 in both towers


# -- pictures into CLIP's range ---------------------------------------------------------------------------------------


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


# -- transformer ------------------------------------------------------------------------------------------------------


class LayerNorm(nn.LayerNorm):
    """Layer normalisation in float32 whatever the type of x, as the reference does."""

    def forward(self, x):
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x): not the GELU of torch, with which the weights would give wrong features."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Self-attention with one packed projection, order q, k, v.   x (B, T, w) -> (B, T, w)"""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, causal):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)              # (B, T, 3 w)
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)   # each (B, heads, T, w / heads)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + Attention(LN x), then x + MLP(LN x)."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.attn = LayerNorm(width), Attention(width, heads)
        self.ln_2 = LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width)))

    def forward(self, x, causal=False):
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The blocks of a tower; a module of its own only so that names equal OpenAI's."""

    def __init__(self, width, depth, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, x, causal=False):
        for block in self.resblocks:
            x = block(x, causal)
        return x


# -- towers -----------------------------------------------------------------------------------------------------------


class ImageTower(nn.Module):
    """Vision transformer: patches and a class token, normalised before the first block.

    Activations run in the weights' type (half is fine on a GPU); inputs are cast to it and results cast back.
    """

    def __init__(self, width, depth, heads, patch, grid, embed):
        super().__init__()
        self.width, self.patch, self.grid, self.size = width, patch, grid, patch * grid
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) / width**0.5)
        self.positional_embedding = nn.Parameter(torch.randn(1 + grid * grid, width) / width**0.5)
        self.ln_pre, self.transformer = LayerNorm(width), Transformer(width, depth, heads)
        self.ln_post, self.proj = LayerNorm(width), nn.Parameter(torch.randn(width, embed) / width**0.5)

    def tokens(self, feature):
        """Class token in front of a patch map, positions, ln_pre.   (B, w, g, g) -> (B, N, w)"""
        patches = feature.flatten(2).transpose(1, 2)                           # row-major patches
        first = self.class_embedding.to(feature.dtype).expand(len(feature), 1, -1)
        return self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding.to(feature.dtype))

    def as_map(self, x):
        """Drop the class token and fold the patches back.   (B, N, w) -> (B, w, g, g)"""
        return x[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))

    def forward(self, x, taps=()):
        """features (B, len(taps), w, g, g) after the blocks `taps` (0-based), embedding (B, E); see CLIP.encode_image."""
        if x.shape[-2:] != (self.size, self.size):
            raise ValueError(f"CLIP's image tower reads {self.size} x {self.size} pictures, these are "
                             f"{' x '.join(map(str, x.shape[-2:]))}; pass them through data.clip.standard(x, {self.size})")
        check_layers("taps", taps, self.transformer.resblocks)
        h, seen = self.tokens(self.conv1(x.to(self.conv1.weight.dtype))), {}
        for i, block in enumerate(self.transformer.resblocks):
            h = block(h)
            if i in taps:
                seen[i] = self.as_map(h)
        features = [seen[i] for i in taps]
        features = torch.stack(features, 1) if taps else h.new_empty(len(x), 0, self.width, self.grid, self.grid)
        return features.to(x.dtype), (self.ln_post(h[:, 0]) @ self.proj).to(x.dtype)

    def map_tokens(self, feature, prompts, prompt_layers):
        """GALIP's mapper: a made-up patch map through the blocks, prompted.   -> (B, w, g, g)

        feature (B, w, g, g) plays the patch convolution's output; prompts (B, P, w), prompt_layers P block numbers
        (0-based). At block prompt_layers[k] the token prompts[:, k] is appended, and dropped again right after it.
        No ln_post, no projection. Gradients flow through frozen weights to feature and prompts.
        """
        check_layers("prompt_layers", prompt_layers, self.transformer.resblocks)
        if prompts.shape[1:] != (len(prompt_layers), self.width):
            raise ValueError(f"{len(prompt_layers)} prompt layers need prompts of shape (B, {len(prompt_layers)}, {self.width}), "
                             f"got {tuple(prompts.shape)}")
        dtype = self.conv1.weight.dtype
        h, prompts = self.tokens(feature.to(dtype)), dict(zip(prompt_layers, prompts.to(dtype).unbind(1), strict=True))
        for i, block in enumerate(self.transformer.resblocks):
            h = block(torch.cat([h, prompts[i][:, None]], 1))[:, :-1] if i in prompts else block(h)
        return self.as_map(h).to(feature.dtype)


def check_layers(name, layers, blocks):
    """raises ValueError for a block that is not there or is named twice"""
    if len(set(layers)) < len(layers) or any(not 0 <= i < len(blocks) for i in layers):
        raise ValueError(f"{name}={tuple(layers)}: this tower has blocks 0 to {len(blocks) - 1}, each may be named once")


class TextTower(nn.Module):
    """Causal transformer over token ids. embed=0 leaves the projection out (Stable Diffusion's text encoder)."""

    def __init__(self, width, depth, heads, context, vocabulary, embed):
        super().__init__()
        self.width, self.context, self.vocabulary = width, context, vocabulary
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.randn(context, width) * 0.01)
        self.transformer, self.ln_final = Transformer(width, depth, heads), LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, embed) / width**0.5) if embed else None
        self.initialise(width, depth)

    def initialise(self, width, depth):
        """The reference's: residual branches shrink with depth."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            for out in (block.attn.out_proj, block.mlp.c_proj):
                nn.init.normal_(out.weight, std=width**-0.5 * (2 * depth) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)

    def forward(self, tokens):
        """ids (B, T <= context) -> sentence (B, E) or None, words (B, T, w); see CLIP.encode_text."""
        if tokens.shape[1] > self.context or (tokens.numel() and not 0 <= tokens.min() <= tokens.max() < self.vocabulary):
            raise ValueError(f"CLIP's text tower reads up to {self.context} ids below {self.vocabulary}, these are "
                             f"{tokens.shape[1]} ids up to {tokens.max()}; use the tokeniser that belongs to these weights")
        positions = self.positional_embedding[: tokens.shape[1]]
        dtype = self.transformer.resblocks[0].attn.in_proj_weight.dtype
        x = (self.token_embedding(tokens) + positions).to(dtype)               # (B, T, w)
        words = self.ln_final(self.transformer(x, causal=True)).float()        # causal: padding cannot reach back
        if self.text_projection is None:
            return None, words
        last = words[torch.arange(len(tokens), device=tokens.device), tokens.argmax(1)]    # end-of-text: largest id
        return last @ self.text_projection.float(), words


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
        no_grad for real pictures, and with gradients for generated ones: frozen weights let them through to the pixels.
        """
        return self.visual(x, taps)

    def encode_text(self, tokens):
        """ids (B, T) -> sentence (B, E), words (B, T, width of the text tower: ln_final of every position)"""
        return self.text(tokens)

    def map_tokens(self, feature, prompts, prompt_layers):
        return self.visual.map_tokens(feature, prompts, prompt_layers)


# -- weights ----------------------------------------------------------------------------------------------------------


def count(state, pattern):
    """How many numbers i the pattern's first group takes among the names."""
    return len({m[1] for name in state if (m := re.search(pattern, name))})


def heads_of(width, heads, which):
    if heads or width % HEAD_WIDTH == 0:
        return heads or width // HEAD_WIDTH
    raise ValueError(f"the file does not say how many heads the {which} tower has and its width {width} is not a multiple of "
                     f"{HEAD_WIDTH}; pass heads=(image, text)")


def image_tower(state, heads=None):
    """An empty image tower of the sizes of a state dict in OpenAI's names without `visual.`."""
    width, _, _, patch = state["conv1.weight"].shape
    positions, depth = len(state["positional_embedding"]), count(state, r"resblocks\.(\d+)\.attn\.in_proj_weight")
    grid = round((positions - 1) ** 0.5)
    return ImageTower(width, depth, heads_of(width, heads, "image"), patch, grid, state["proj"].shape[1])


def text_tower(state, heads=None):
    """An empty text tower of the sizes of a state dict in OpenAI's names; no projection if the state dict has none."""
    vocabulary, width = state["token_embedding.weight"].shape
    depth, context = count(state, r"resblocks\.(\d+)\.attn\.in_proj_weight"), len(state["positional_embedding"])
    embed = state["text_projection"].shape[1] if "text_projection" in state else 0
    return TextTower(width, depth, heads_of(width, heads, "text"), context, vocabulary, embed)


def from_official(state, heads=(None, None), where="the state dict"):
    """CLIP, or only a TextTower, with the weights of a state dict in OpenAI's or Hugging Face's names; frozen, float32.

    heads  (image, text); None: width / 64, as in everything OpenAI released
    """
    state = {name: tensor for name, tensor in state.items()
             if name not in ("input_resolution", "context_length", "vocab_size") and not name.endswith("position_ids")}
    if any(".encoder.layers." in f".{name}" for name in state):
        state = from_hugging_face(state, where)
    image = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.")}
    text = {name: t for name, t in state.items() if not name.startswith("visual.") and name != "logit_scale"}
    try:
        with torch.device("meta"):
            towers = image_tower(image, heads[0]) if image else None, text_tower(text, heads[1])
            model = CLIP(*towers) if image else towers[1]
    except (KeyError, AttributeError, IndexError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"{where} is not a CLIP with a vision transformer: entry {error} is missing or has another shape; "
                         f"its first names are {', '.join(sorted(state)[:4])}") from error
    model = model.to_empty(device="cpu")

    def rename(name):
        return name if not image or name.startswith("visual.") or name == "logit_scale" else f"text.{name}"

    return freeze(load_checked(model, state, where, rename))


def official_names(model):
    """The state dict of a CLIP under OpenAI's names (302 entries at ViT-B/32's depth)."""
    return {name.removeprefix("text."): tensor for name, tensor in model.state_dict().items()}


def from_hugging_face(state, where):
    """`clip-vit-base-patch32` or a `text_encoder` folder -> OpenAI's names. The layout's names are UNVERIFIED here.

    Separate q, k, v projections are stacked in that order; the two output projections are transposed.
    """
    renamed, parts = {}, {}
    pieces = [("self_attn.out_proj", "attn.out_proj"), ("final_layer_norm", "ln_final"), ("layer_norm", "ln_"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
              ("embeddings.patch_embedding", "conv1"), ("embeddings.class_embedding", "class_embedding"),
              ("embeddings.position_embedding.weight", "positional_embedding"), ("embeddings.token_embedding", "token_embedding"),
              ("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post"),
              ("encoder.layers", "transformer.resblocks")]      # pre_layrnorm: misspelt there
    for name, tensor in state.items():
        if name in ("visual_projection.weight", "text_projection.weight"):
            renamed["visual.proj" if name[0] == "v" else "text_projection"] = tensor.T
            continue
        new = "visual." + name.removeprefix("vision_model.") if name.startswith("vision_model.") else name.removeprefix("text_model.")
        for theirs, ours in pieces:
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


def read_torchscript(path, trust=False):
    """State dict of a TorchScript archive, the form in which OpenAI released CLIP.

    torch.jit.load is not a weights-only reader: an archive is a program. The released ViT-B-32.pt is known by its
    SHA-256; any other one needs trust=True.
    """
    digest = sha256(path)
    if digest != VIT_B_32 and not trust:
        raise ValueError(f"{path} is a TorchScript archive, which is a program, and not the released ViT-B-32.pt (SHA-256 "
                         f"{digest}); if you know where it comes from, load it with trust=True")
    try:
        return torch.jit.load(str(path), map_location="cpu").state_dict()
    except RuntimeError as error:
        raise ValueError(f"{path} is a damaged TorchScript archive ({str(error).splitlines()[0][:120]})") from error


def is_torchscript(path):
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[1:2] in (["code"], ["constants.pkl"]) for name in archive.namelist())


def load(path, heads=(None, None), trust=False):
    """CLIP (or a lone TextTower) from a file or a Hugging Face folder, frozen, in float32; `.sha256` says which file.

    raises  FileNotFoundError or ValueError: what is missing, what does not fit, what to do
    """
    path = Path(path)
    if path.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds neither {' nor '.join(names)}: not a Hugging Face folder of CLIP")
        path = found[0]
    metadata = {}
    if path.is_file() and is_torchscript(path):
        state = read_torchscript(path, trust)
    else:
        state, metadata = read_state(path)
    if "image_heads" in metadata:
        heads = int(metadata["image_heads"]), int(metadata["text_heads"])
    model = from_official(state, heads, path)
    model.sha256 = sha256(path)
    return model


def small():
    """The small CLIP of the built-in world (64 x 64 pictures), frozen. Its words: `small_tokeniser()`."""
    return load(SMALL)


def small_tokeniser():
    """The word table that the shipped weights were trained with; it travels in their file."""
    from data.text import WordTokenizer

    state, metadata = read_safetensors(SMALL)
    return WordTokenizer(metadata["words"].split(), context=len(state["positional_embedding"]))


def freeze(model):
    """No gradients for the weights, though still through them."""
    return model.requires_grad_(False).eval()
