"""Sentences as vectors of a frozen CLIP, and how the small CLIP learns the words of other data than the built-in world.

With OpenAI's weights (--clip) any sentence can be read. Without them there is the small CLIP that is shipped: it knows the
words of the built-in world only. On other pictures it is first fitted to the training pairs (`fit`), then frozen.
"""
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from data import clip as clips
from data import parallel
from data.batches import batch_rows, seed_from
from data.text import BytePairs, WordTokenizer, read_merges, words_of

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
LARGEST_SCALE = 4.6052          # ln 100: the bound of CLIP's temperature


class Sentences:
    """A frozen CLIP with its tokeniser.   words(texts) -> (B, E) sentence vectors, not normalised, without gradient"""

    def __init__(self, path="", vocabulary=""):
        self.fitted = False                                     # True once the weights are no longer those of a file
        if path:
            self.clip = clips.load(path)
            merges = read_merges(vocabulary or Path(path).with_name(VOCABULARY))
            self.tokeniser = BytePairs(merges, self.clip.context)
        else:
            self.clip, self.tokeniser = clips.small(), clips.small_tokeniser()

    def to(self, device):
        self.clip.to(device)
        self.device = device
        return self

    def adopt(self, words):
        """Another word table: known words keep their vectors, new ones start at random. Everything else stays."""
        old, table, known = self.tokeniser, self.clip.text.token_embedding, self.tokeniser.ids
        self.tokeniser = new = WordTokenizer(words, old.context)
        rows = torch.randn(new.size, table.embedding_dim) * table.weight.std().item()
        pairs = [(new.ids[w], known[w]) for w in words if w in known] + [(0, 0), (new.start, old.start), (new.end, old.end)]
        ours, theirs = torch.tensor(pairs).T
        rows[ours] = table.weight.detach()[theirs]
        self.clip.text.token_embedding = nn.Embedding.from_pretrained(rows)
        self.clip.text.vocabulary, self.fitted = new.size, True

    def ids(self, texts, strict=False):
        """-> (B, T); strict: an unknown word or too long a text is an error, else it is left out or cut off"""
        if not strict and isinstance(self.tokeniser, WordTokenizer):
            texts = [" ".join(w for w in words_of(text) if w in self.tokeniser.ids) for text in texts]
        ids = self.tokeniser(texts, truncate=not strict)
        return ids[:, : int(ids.argmax(1).max()) + 1].to(self.device)       # what follows the end mark changes nothing

    @torch.no_grad()
    def __call__(self, texts, strict=False):
        return self.clip.encode_text(self.ids(texts, strict))[0]

    def state_dict(self):
        """What a checkpoint must hold to read sentences again: the file's hash, or the weights if they are its own."""
        if not self.fitted:
            return {"sha256": self.clip.sha256}
        return {"words": self.tokeniser.words, "weights": self.clip.state_dict()}

    def load_state_dict(self, state):
        if "words" in state:
            self.adopt(state["words"])
            self.clip.load_state_dict(state["weights"])
        elif self.fitted or state.get("sha256") != self.clip.sha256:
            raise ValueError("it was trained with another CLIP; pass the same file with --clip")
        self.to(self.device)


def table(data, least=2):
    """Words that occur in at least `least` training sentences, the most frequent first."""
    counts = {}
    for told in data.captions:
        for text in told:
            for word in words_of(text):
                counts[word] = counts.get(word, 0) + 1
    return sorted((w for w, n in counts.items() if n >= least), key=lambda w: (-counts[w], w))


def fit(words, data, steps, seed, batch=64, lr=5e-4):
    """Fit CLIP to the training pairs of a data set by its contrastive loss (clip.md: soft targets), then freeze it again.

    A stand-in for OpenAI's weights where they are not at hand; a few thousand pairs teach it those pairs and little more.
    Every rank computes the whole batch: all pairs are each other's negatives.   -> last loss, a float
    """
    clip = words.clip.requires_grad_(True)
    optimiser = torch.optim.AdamW(clip.parameters(), lr, (0.9, 0.98), eps=1e-6, weight_decay=0.05)
    for t in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min((t + 1) / 50, 1 - t / steps)
        rows = batch_rows(len(data), batch, seed_from(seed, 1), t)
        texts = data.sentences(rows, seed_from(seed, 2, t))
        pictures = clips.standard(data.images(rows, seed_from(seed, 3, t)), clip.size).to(words.device)
        image, text = clip.encode_image(pictures)[1], clip.encode_text(words.ids(texts))[0]
        same = torch.tensor([[a == b for b in texts] for a in texts], device=words.device).float()
        logits = clip.logit_scale.exp() * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T            # (N, N)
        targets = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        parallel.descend(optimiser, loss, clip=1.0)
        clip.logit_scale.data.clamp_(max=LARGEST_SCALE)
    clips.freeze(clip)
    return float(loss.detach())
