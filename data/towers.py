"""CLIP's two transformers, at any size: names inside the image tower are OpenAI's (Radford et al., ICML 2021).

Used through data/clip.py, which says where the weights come from. Shape letters: B batch, T text tokens,
N = 1 + g g image tokens, w width, E embedding.
"""
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F


class LayerNorm(nn.LayerNorm):
    """Layer normalisation in float32 whatever the type of x, as the reference does."""

    def forward(self, x):
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x): not the GELU of torch, with which the weights would give wrong features.

    Written with silu(z) = z sigmoid(z): three passes over memory back and forth each instead of three and five.
    """

    def forward(self, x):
        return F.silu(1.702 * x) / 1.702


class Attention(nn.Module):
    """Self-attention with one packed projection, order q, k, v.   x (B, T, w) -> (B, T, w)

    At 50 tokens it is too small for a kernel of our own; torch's scaled_dot_product_attention picks one.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, causal):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)                      # each (B, heads, T, w / heads)
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
        if heads < 1 or width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, x, causal=False):
        for block in self.resblocks:
            x = block(x, causal)
        return x


# -- pictures ------------------------------------------------------------------------------------------------


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
        patches = feature.flatten(2).transpose(1, 2)                        # row-major patches
        first = self.class_embedding.to(feature.dtype).expand(len(feature), 1, -1)
        return self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding.to(feature.dtype))

    def as_map(self, x):
        """Drop the class token and fold the patches back.   (B, N, w) -> (B, w, g, g)"""
        return x[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))

    def forward(self, x, taps=()):
        """Pictures -> features after the blocks `taps`, embedding; see CLIP.encode_image."""
        if x.shape[-2:] != (self.size, self.size):
            raise ValueError(f"CLIP's image tower reads {self.size} x {self.size} pictures, these are {x.shape[-2]} x "
                             f"{x.shape[-1]}; prepare them with data.clip.standard(x, {self.size})")
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
            raise ValueError(f"{len(prompt_layers)} prompt layers need prompts of shape "
                             f"(B, {len(prompt_layers)}, {self.width}), got {tuple(prompts.shape)}")
        dtype = self.conv1.weight.dtype
        added = dict(zip(prompt_layers, prompts.to(dtype).unbind(1), strict=True))
        h = self.tokens(feature.to(dtype))
        for i, block in enumerate(self.transformer.resblocks):
            h = block(torch.cat([h, added[i][:, None]], 1))[:, :-1] if i in added else block(h)
        return self.as_map(h).to(feature.dtype)


def check_layers(name, layers, blocks):
    """raises ValueError for a block that is not there or is named twice"""
    if len(set(layers)) < len(layers) or any(not 0 <= i < len(blocks) for i in layers):
        raise ValueError(f"{name}={tuple(layers)}: this tower has blocks 0 to {len(blocks) - 1}, each may be named once")


# -- text ----------------------------------------------------------------------------------------------------


class TextTower(nn.Module):
    """Causal transformer over token ids. embed=0 leaves the projection out (Stable Diffusion's encoder)."""

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
        """ids (B, T <= context) -> sentence (B, E), or None without a projection, words (B, T, w); float32

        No mask for padding: the causal mask keeps whatever follows end-of-text from the row that is read.
        """
        length, legal = tokens.shape[1], (tokens >= 0) & (tokens < self.vocabulary)
        if length > self.context or not legal.all():
            raise ValueError(f"CLIP's text tower reads up to {self.context} ids below {self.vocabulary}, these are "
                             f"{length} ids up to {int(tokens.max())}; use the tokeniser that belongs to these weights")
        dtype = self.transformer.resblocks[0].attn.in_proj_weight.dtype
        x = (self.token_embedding(tokens) + self.positional_embedding[:length]).to(dtype)    # (B, T, w)
        words = self.ln_final(self.transformer(x, causal=True)).float()
        if self.text_projection is None:
            return None, words
        end = tokens.argmax(1)                                              # end-of-text has the largest id
        return words[torch.arange(len(tokens), device=tokens.device), end] @ self.text_projection.float(), words
