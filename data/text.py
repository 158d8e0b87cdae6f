"""Text to ids, on the standard library: CLIP's byte pairs, the small CLIP's words, a vocabulary of a training set.

BytePairs      CLIP's tokeniser; the merges come from the user's copy of the published vocabulary file
WordTokenizer  one id a word, for the built-in world's grammar; an unknown word is an error that names near ones
Vocabulary     the words of a training set in order of appearance; unknown words share one id (real data sets)
"""
import difflib
import functools
import html
import re
import unicodedata

import torch

from data.safe import read_text

MERGES = 49152 - 256 - 2              # merges that CLIP uses; the published file lists 262,145, the rest is ignored
SPECIALS = ("<|startoftext|>", "<|endoftext|>")
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'ſ")      # the reference ignores case: long s is an s
SPACES = {*"\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000", *map(chr, range(0x2000, 0x200B))}


# -- CLIP's byte pairs ---------------------------------------------------------------------------------------


def byte_symbols():
    """{byte: printable character}, in the order of the ids 0..255: byte 33 "!" is id 0.

    Printable Latin-1 bytes stand for themselves and come first; the other 68 become code points 256, 257, ...
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


def clean(text):
    """HTML entities undone twice, any white space made a plain space (`scan` drops it), lower case.

    # Official code: also repairs mojibake with ftfy; left out (standard library only): only broken Unicode differs.
    """
    text = html.unescape(html.unescape(text)).strip()
    return "".join(" " if ch in SPACES else ch for ch in text).strip().lower()


def kind(ch):
    """Unicode class of a character as the scanner sees it: L letter, N number, space, or other."""
    if ch in SPACES:
        return "space"
    first = unicodedata.category(ch)[0]
    return first if first in "LN" else "other"


def scan(text):
    """Split cleaned text into pieces; the first rule that matches at a position wins.

    special marker | contraction | letters | ONE number character | anything else but space
    The reference uses the pattern \\p{L}+|\\p{N}|[^\\s\\p{L}\\p{N}]+, which the standard `re` cannot express.
    """
    pieces, i = [], 0
    while i < len(text):
        fixed = next((s for s in (*SPECIALS, *CONTRACTIONS) if text.startswith(s, i)), None)
        end = i + (len(fixed) if fixed else 1)
        if not fixed and (rule := kind(text[i])) in ("L", "other"):
            while end < len(text) and kind(text[end]) == rule:
                end += 1
        if fixed or rule != "space":
            pieces.append(text[i:end])
        i = end
    return pieces


def read_merges(path):
    """The merges of CLIP's vocabulary file (`bpe_simple_vocab_16e6.txt.gz`, or `merges.txt`).   -> list of pairs

    raises  FileNotFoundError, or ValueError for a file that is cut short, not text or not a table of merges
    """
    text = read_text(path, "CLIP's vocabulary, bpe_simple_vocab_16e6.txt.gz (1,356,917 bytes), comes with OpenAI's CLIP; put it "
                           "beside the weights and pass its path")
    merges = [tuple(line.split()) for line in text.split("\n")[1 : MERGES + 1]]          # line 0 is a version comment
    wrong = next((n for n, pair in enumerate(merges) if len(pair) != 2), len(merges))
    if wrong < MERGES:
        raise ValueError(f"{path} is not a whole CLIP vocabulary: line {wrong + 2} should hold two symbols and there "
                         f"should be {MERGES:,} such lines after the first; copy the file again")
    return merges


class BytePairs:
    """CLIP's tokeniser: tokens = BytePairs(read_merges(path))(texts), (B, context) int64.

    ids: 256 byte symbols, the same with the end-of-word mark </w>, one per merge, start-of-text, end-of-text.
    """

    def __init__(self, merges, context=77):
        self.bytes = byte_symbols()
        symbols = list(self.bytes.values())
        self.symbols = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges] + list(SPECIALS)
        self.ids = {symbol: n for n, symbol in enumerate(self.symbols)}
        self.rank = {tuple(pair): n for n, pair in enumerate(merges)}
        self.start, self.end = (self.ids[s] for s in SPECIALS)
        self.context, self.pad = context, 0                 # Stable Diffusion pads with `end`
        self.merge = functools.lru_cache(maxsize=2**16)(self.merge)     # the same words come again and again

    def merge(self, piece):
        """Byte pairs of one piece: the adjacent pair of lowest rank is joined everywhere until none has a rank."""
        if piece in SPECIALS:
            return (piece,)
        word = [self.bytes[b] for b in piece.encode("utf-8")]
        word[-1] += "</w>"
        while len(word) > 1:
            pair = min(zip(word, word[1:], strict=False), key=lambda p: self.rank.get(p, len(self.rank)))
            if pair not in self.rank:
                break
            joined, i = [], 0
            while i < len(word):
                step = 2 if tuple(word[i : i + 2]) == pair else 1
                joined.append("".join(word[i : i + step]))
                i += step
            word = joined
        return tuple(word)

    def encode(self, text):
        """ids of one text without start and end.   -> list of int"""
        return [self.ids[symbol] for piece in scan(clean(text)) for symbol in self.merge(piece)]

    def __call__(self, texts, truncate=False):
        """(B, context) int64; too long a text is an error, or with truncate=True is cut and keeps its end mark."""
        return pack(texts, self.encode, self.start, self.end, self.context, truncate, self.pad)


def pack(texts, encode, start, end, context, truncate, pad=0):
    """[start] + ids + [end], padded.   -> (B, context) int64       raises ValueError for text that does not fit"""
    texts = [texts] if isinstance(texts, str) else texts
    rows = torch.full((len(texts), context), pad, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        ids = [start, *encode(text), end]
        if len(ids) > context and not truncate:
            raise ValueError(f"'{text[:60]}...' has {len(ids)} tokens with start and end, the text tower reads "
                             f"{context}; shorten it or pass truncate=True")
        if len(ids) > context:
            ids = [*ids[: context - 1], end]
        row[: len(ids)] = torch.tensor(ids)
    return rows


# -- the small CLIP's words ----------------------------------------------------------------------------------


def words_of(text):
    """Lower-case words; punctuation is dropped, an apostrophe or hyphen inside a word stays."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def hint(word, known):
    """What to say of a word that is not known: the nearest that are, or else the first of them all."""
    near = difflib.get_close_matches(word, known, 3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else f"it knows {', '.join(known[:160])}"


class WordTokenizer:
    """One id a word: 0 padding, words from 1 in the given order, then start, then end as the LARGEST id.

    The text tower finds the end of a text as the argmax of its ids, so no word may come after it.
    """

    def __init__(self, words, context=32):
        if not words or len(set(words)) < len(words):
            repeated = sorted({word for word in words if words.count(word) > 1})
            raise ValueError(f"a word table needs distinct words; repeated: {', '.join(repeated) or 'none, there is no word'}")
        self.words, self.context = list(words), context
        self.ids = {word: n for n, word in enumerate(self.words, 1)}
        self.start, self.end, self.size = len(words) + 1, len(words) + 2, len(words) + 3

    def encode(self, text):
        """ids of one text without start and end.   raises ValueError for an unknown word, naming the nearest ones"""
        found = words_of(text)
        for word in found:
            if word not in self.ids:
                raise ValueError(f"'{word}' in '{text[:60]}' is not among the {len(self.words)} words of the "
                                 f"built-in world: {hint(word, self.words)}")
        return [self.ids[word] for word in found]

    def __call__(self, texts, truncate=False):
        """(B, context) int64, zero padded."""
        return pack(texts, self.encode, self.start, self.end, self.context, truncate)


# -- words of real data sets ----------------------------------------------------------------------------------


class Vocabulary:
    """Words of a training set: 0 <NULL> (padding), 1 <UNK>, then in order of first appearance."""

    def __init__(self, texts, least=1, split=words_of):
        counts = {}
        for text in texts:
            for word in split(text):
                counts[word] = counts.get(word, 0) + 1
        self.split = split
        self.words = ["<NULL>", "<UNK>", *(word for word, count in counts.items() if count >= least)]
        self.ids = {word: n for n, word in enumerate(self.words)}

    def __len__(self):
        return len(self.words)

    def __call__(self, texts, length=None):
        """ids (B, length) int64, zero padded or cut, and the lengths (B,); an empty text becomes one <UNK>."""
        rows = [[self.ids.get(word, 1) for word in self.split(text)] or [1] for text in texts]
        length = length or max(map(len, rows), default=1)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        for row, found in zip(ids, rows, strict=True):
            row[: min(length, len(found))] = torch.tensor(found[:length])
        return ids, torch.tensor([min(length, len(found)) for found in rows], dtype=torch.long)
