"""Tokenisers: the scanner against rules written another way, byte pairs by hand, word tables, real questions."""
import gzip
import os
import random
import re
import unicodedata

import pytest
import torch

from data.text import MERGES, BytePairs, Vocabulary, WordTokenizer, byte_symbols, clean, read_merges, scan, words_of

GOLDEN = {  # from the reference implementation, without start and end
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "a diagram": [320, 22697],
    "A small red circle on a blue background.": [320, 2442, 736, 7117, 525, 320, 1746, 5994, 269],
    "a small red circle at the left on a black background": [
        320, 2442, 736, 7117, 536, 518, 1823, 525, 320, 1449, 5994],
    "The bird's 3 wings, isn't it?  Naïve café — 2x": [
        518, 3329, 568, 274, 5178, 267, 2923, 713, 585, 286, 1097, 35689, 563, 15304, 2005, 273, 343],
    "line drawing illustration of a kawaii cute ghost.": [1148, 3610, 6052, 539, 320, 26891, 2242, 7108, 269],
}
TABLE = [("a", "b"), ("ab", "c</w>"), ("c", "a"), ("b", "c</w>"), ("a", "b</w>")]


def tokeniser(**options):
    return BytePairs(TABLE, **options)


# -- scanner -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, pieces", [
    ("it's we're i'll don't", ["it", "'s", "we", "'re", "i", "'ll", "don", "'t"]),
    ("a1b22", ["a", "1", "b", "2", "2"]),
    ("x² ⅳ ½ ٣", ["x", "²", "ⅳ", "½", "٣"]),
    ("wow!!! ok?", ["wow", "!!!", "ok", "?"]),
    ("naïve漢字 café", ["naïve漢字", "café"]),
    ("!'s", ["!'", "s"]),                                   # the apostrophe is swallowed by the run before it
    ("e\u0301a", ["e", "\u0301", "a"]),                     # a combining mark is neither letter nor number
    ("a\u200bb", ["a", "\u200b", "b"]),                     # nor is a zero-width space white space
    ("<|endoftext|>x<|startoftext|>", ["<|endoftext|>", "x", "<|startoftext|>"]),
    ("", []), (" \t\n ", []),
])
def test_scanner_by_hand(text, pieces):
    assert scan(text) == pieces


def test_scanner_equals_the_reference_pattern_with_classes_spelt_out():
    pool = [*"abcxyz'’sdtrevml 09\t\n.,!?-<|>éïøß漢字かな한ⅳ²½٣😀\u0301\u200b\u200d\u00a0\u3000", "<|endoftext|>", "'re", "'ll"]
    letters = "".join(c for c in set("".join(pool)) if unicodedata.category(c).startswith("L"))
    numbers = "".join(c for c in set("".join(pool)) if unicodedata.category(c).startswith("N"))
    pattern = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
                         rf"[{letters}]+|[{numbers}]|[^\s{letters}{numbers}]+")
    draw = random.Random(0)
    for _ in range(3000):
        text = "".join(draw.choice(pool) for _ in range(draw.randint(0, 24)))
        assert scan(text) == pattern.findall(text), repr(text)


def test_cleaning_undoes_html_twice_and_lowers_case():
    assert clean("  A&amp;amp;B\t&lt;C&gt;\n ") == "a&b <c>"


# -- byte pairs ----------------------------------------------------------------------------------------------


def test_byte_symbols_are_256_distinct_characters_in_the_published_order():
    table = byte_symbols()
    assert sorted(table) == list(range(256)) and len(set(table.values())) == 256
    assert list(table)[:3] == [33, 34, 35] and list(table)[188:190] == [0, 1]
    assert table[32] == chr(256 + 32) and table[10] == chr(256 + 10) and table[127] == chr(256 + 33)


def test_ids_are_laid_out_as_published():
    t = tokeniser()
    assert t.ids["!"] == 0 and t.ids["!</w>"] == 256 and t.ids["ab"] == 512 and t.ids["abc</w>"] == 513
    assert (t.start, t.end) == (517, 518) and len(t.symbols) == 519


@pytest.mark.parametrize("word, parts", [
    ("abc", ["abc</w>"]),                   # rank 0 joins a b, rank 1 finishes
    ("ab", ["ab</w>"]),                     # the last letter carries </w>, so only rank 4 applies
    ("cab", ["ca", "b</w>"]),               # rank 2 (c a) comes before rank 4 (a b</w>)
    ("ababc", ["ab", "abc</w>"]),           # every occurrence of the lowest pair, left to right
    ("bc", ["bc</w>"]), ("c", ["c</w>"]),
    ("é", ["Ã", "©</w>"]),                  # two bytes of UTF-8
])
def test_merging_by_hand(word, parts):
    assert list(tokeniser().merge(word)) == parts


def test_packing_adds_start_and_end_and_pads_and_truncates():
    t = tokeniser(context=5)
    assert t(["abc", "abc c"]).tolist() == [[517, 513, 518, 0, 0], [517, 513, 322, 518, 0]]
    with pytest.raises(ValueError, match="6 tokens with start and end, the text tower reads 5"):
        t("c c c c")
    assert t("c c c c", truncate=True).tolist() == [[517, 322, 322, 322, 518]]
    assert (t(["c", ""]).argmax(1) == torch.tensor([2, 1])).all()       # end-of-text has the largest id
    t.pad = t.end
    assert t("c").tolist() == [[517, 322, 518, 518, 518]]


def test_nothing_is_lost_between_a_text_and_its_ids():
    t, letters = tokeniser(), {character: byte for byte, character in byte_symbols().items()}
    for text in ("abc cab", "naïve 漢字 😀", "tab"):
        parts = "".join(t.symbols[i] for i in t.encode(text)).split("</w>")
        assert b" ".join(bytes(letters[ch] for ch in part) for part in parts[:-1]).decode() == text


def vocabulary_file(folder, lines=MERGES + 10, name="bpe.txt.gz"):
    """A file of the published layout with made-up merges."""
    text = "\n".join(['"version: 0.2"', *(f"x{n} y{n}" for n in range(lines)), ""])
    (folder / name).write_bytes(gzip.compress(text.encode(), 1) if name.endswith("gz") else text.encode())
    return folder / name


def test_the_vocabulary_file_is_read_up_to_the_last_merge_that_counts(tmp_path):
    for name in ("bpe.txt.gz", "merges.txt"):
        merges = read_merges(vocabulary_file(tmp_path, name=name))
        assert len(merges) == 48_894 and merges[0] == ("x0", "y0")
    t = BytePairs(merges)
    assert (t.start, t.end) == (49406, 49407)


def test_a_bad_vocabulary_gets_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="bpe_simple_vocab_16e6"):
        read_merges(tmp_path / "absent.gz")
    whole = vocabulary_file(tmp_path)
    whole.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged"):
        read_merges(whole)
    with pytest.raises(ValueError, match="line 102 should hold two symbols"):
        read_merges(vocabulary_file(tmp_path, lines=100))
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xe9" * 20)
    with pytest.raises(ValueError, match=r"latin\.txt, line 1: byte 0xff is not UTF-8"):
        read_merges(tmp_path / "latin.txt")


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_ids_of_the_published_vocabulary(text):
    path = os.environ.get("SEPTET_CLIP_VOCABULARY")
    if not path:
        pytest.skip("needs bpe_simple_vocab_16e6.txt.gz: set SEPTET_CLIP_VOCABULARY to its path")
    assert BytePairs(read_merges(path)).encode(text) == GOLDEN[text]


# -- word tables ---------------------------------------------------------------------------------------------


def test_word_ids_start_at_one_and_end_is_the_largest():
    t = WordTokenizer(["red", "blue", "circle"], context=6)
    assert t("Blue circle, red!").tolist() == [[4, 2, 3, 1, 5, 0]]
    assert (t.start, t.end, t.size) == (4, 5, 6)
    with pytest.raises(ValueError, match="7 tokens"):
        t("red red red red red")


def test_an_unknown_word_names_its_nearest_ones():
    t = WordTokenizer(["a", "red", "green", "circle"])
    with pytest.raises(ValueError, match=r"'cirle' in 'a cirle' is not among the 4 words .* did you mean circle"):
        t("a cirle")
    with pytest.raises(ValueError, match="it knows a, red, green, circle"):
        t("zzz")


@pytest.mark.parametrize("words", [[], ["red", "red"]])
def test_a_word_table_needs_distinct_words(words):
    with pytest.raises(ValueError, match="distinct words"):
        WordTokenizer(words)


def test_words_keep_inner_apostrophes_and_hyphens():
    assert words_of("Pip's half-moon -- walks, ok_then.") == ["pip's", "half-moon", "walks", "ok", "then"]


def test_vocabulary_counts_from_the_training_texts_only():
    v = Vocabulary(["what is a dog", "what is a cat"], least=2)
    assert v.words == ["<NULL>", "<UNK>", "what", "is", "a"] and len(v) == 5
    ids, lengths = v(["what is a dog", "a", ""])
    assert ids.tolist() == [[2, 3, 4, 1], [4, 0, 0, 0], [1, 0, 0, 0]] and lengths.tolist() == [4, 1, 1]
    ids, lengths = v(["what is a dog"], length=2)
    assert ids.tolist() == [[2, 3]] and lengths.tolist() == [2]
