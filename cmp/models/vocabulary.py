"""A compact CLIP vocabulary: the byte-pair merges that a corpus needs, and no others.

CLIP's tokenizer knows 256 bytes, 256 word-final bytes, 48,894 merges and two marks. Keeping every
byte and only those merges that happen while the corpus is encoded leaves each text of the corpus
with the same pieces as under the full list, and any other text encodable, in smaller pieces. Ids
keep the order of the full list, so the end mark stays the largest.
"""

import gzip
from pathlib import Path

from open_clip.tokenizer import SimpleTokenizer, get_pairs

from cmp.paths import MODEL_CONFIGS

MERGES = MODEL_CONFIGS / "vocabulary.bpe.gz"


def used_merges(texts: list[str]) -> list[tuple[str, str]]:
    """The merges, in the order of CLIP's list, that encoding `texts` performs."""
    full = SimpleTokenizer()
    words = {
        "".join(full.byte_encoder[byte] for byte in word.encode())
        for text in texts
        for word in full.pat.findall(full.clean_fn(text))
    }
    used = {merge for word in words for merge in _merges_of(word, full.bpe_ranks)}
    return sorted(used, key=full.bpe_ranks.__getitem__)


def _merges_of(word: str, ranks: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
    pieces, merges = [*word[:-1], f"{word[-1]}</w>"], []
    while len(pieces) > 1:
        best = min(get_pairs(tuple(pieces)), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merges.append(best)
        joined, index = [], 0
        while index < len(pieces):
            pair = tuple(pieces[index : index + 2])
            joined.append("".join(pair) if pair == best else pieces[index])
            index += 2 if pair == best else 1
        pieces = joined
    return merges


def write(texts: list[str], path: Path = MERGES) -> int:
    """Write the compact merge list of `texts` in CLIP's format; returns the vocabulary's size."""
    lines = ["# the merges of CLIP's vocabulary that the embedded benchmark uses"]
    lines += [" ".join(merge) for merge in used_merges(texts)]
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    return 2 * 256 + len(lines) - 1 + 2
