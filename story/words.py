"""Captions as features of their words: the frozen text encoder in front of StoryImager.

    words, keep = encoder(["Pip the red star walks.", "It jumps."])          # (N, L, D), (N, L) bool: True where a word is

`Encoder` is small, is trained together with the single-frame model (stage 1), then frozen as Stable Diffusion's is.
`Published` is that one: CLIP's text tower with its byte pairs, read from a diffusers folder.
"""
from pathlib import Path

import torch
from torch import nn

from data import clip
from data.text import BytePairs, Vocabulary, hint, read_merges, words_of
from data.towers import TextTower
from data.world import WORDS

START = "<start>"


def with_start(text):
    """Words after a start mark, so that the empty caption is a sentence too."""
    return [START, *words_of(text)]


class Encoder(nn.Module):
    """CLIP's text tower in small: causal, without a projection.   texts -> words (N, L, D), keep (N, L)"""

    def __init__(self, vocabulary, width, depth, heads, length):
        super().__init__()
        self.vocabulary, self.length = vocabulary, length
        self.tower = TextTower(width, depth, heads, length, len(vocabulary), 0)

    def forward(self, texts):
        ids, lengths = self.vocabulary(texts, self.length)
        keep, device = torch.arange(self.length) < lengths[:, None], self.tower.positional_embedding.device
        return self.tower(ids.to(device))[1], keep.to(device)

    def check(self, text):
        """raises ValueError for a word it has never read, naming the nearest ones"""
        for word in words_of(text):
            if word not in self.vocabulary.ids:
                known = sorted(self.vocabulary.words[3:])
                raise ValueError(f"the model has never read the word '{word}' of '{text[:60]}': {hint(word, known)}")
        if (count := len(words_of(text)) + 1) > self.length:
            raise ValueError(f"'{text[:60]}...' has {count - 1} words, the model reads {self.length - 1} a sentence; shorten it")

    def pieces(self, text):
        """What each position holds, for pictures."""
        return with_start(text)[: self.length]

    def cut(self, told):
        """How many captions are longer than it reads."""
        return sum(len(words_of(text)) >= self.length for story in told for text in story)


def encoder(data, cfg):
    """The small encoder for the words of a data set: all words of the built-in world, or those of at least two sentences."""
    if data.name == "builtin":
        texts, least = [" ".join(WORDS)], 1
    else:
        texts, least = [text for story in data.captions for text in story], 2
    vocabulary = Vocabulary(["", *texts, ""], least, with_start)
    return Encoder(vocabulary, cfg.width, cfg.text_depth, cfg.text_heads, cfg.length)


class Published(nn.Module):
    """Stable Diffusion 1.5's text encoder: folder/text_encoder and folder/tokenizer/merges.txt.   768 wide, 77 words"""

    def __init__(self, folder):
        super().__init__()
        self.tower = clip.load(Path(folder) / "text_encoder")
        self.tower = getattr(self.tower, "text", self.tower)
        self.tokeniser, self.length = BytePairs(read_merges(Path(folder) / "tokenizer" / "merges.txt"), self.tower.context), 77
        self.tokeniser.pad = self.tokeniser.end                              # as Stable Diffusion pads

    def forward(self, texts):
        ids = self.tokeniser(texts, truncate=True)
        first = (ids == self.tokeniser.end).int().argmax(1)                  # the first end mark
        keep = torch.arange(ids.shape[1]) <= first[:, None]
        device = self.tower.positional_embedding.device
        return self.tower(ids.to(device))[1], keep.to(device)

    def check(self, text):
        """Byte pairs read every text; one that is too long is an error.   raises ValueError"""
        self.tokeniser([text])

    def pieces(self, text):
        ids = [self.tokeniser.start, *self.tokeniser.encode(text)][: self.length]
        return [self.tokeniser.symbols[i].replace("</w>", "") for i in ids]

    def cut(self, told):
        return sum(len(self.tokeniser.encode(text)) > self.length - 2 for story in told for text in story)
