"""Tokenizer of the embedded model: CLIP's byte-level BPE, trained on captions of the sprite world and common English
words.

Every byte is in the vocabulary, so any prompt can be tokenized. Each word of the sprite world is one token.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from ..data.sprite_world.sprites import CATEGORIES
from ..data.sprite_world.world import SpriteWorld
from .networks import TEXT_LENGTH

# Training text of the tokenizer, so that words outside the sprite world are not split into single bytes. Do not change
# it, not even its spelling: it determines the vocabulary.
COMMON_WORDS = """
the of and to a in is it you that he was for on are with as his they be at one have this from or had by but what some we
can out other were all there when up use your how said an each she which do their time if will way about many then them
would like so these her long make thing see him two has look more day could go come did number no most people my over
know water than call first who may down side been now find any new work part take get place made live where after back
little only round man year came show every good me give our under name very through just form much great think say help
low line before turn cause same mean differ move right old too does tell set three want air well also play small end put
home read hand port large add even land here must big high such follow act why ask men change went light kind off need
house picture try us again animal point mother world near build self earth father head stand own page should country
found answer school grow study still learn plant cover food sun four thought let keep eye never last door between city
tree cross since hard start might story saw far sea draw left late run while press close night real life few stop open
seem together next white children begin got walk example ease paper often always music those both mark book letter until
mile river car feet care second group carry took rain eat room friend began idea fish mountain north once base hear
horse cut sure watch color face wood main enough plain girl usual young ready above ever red list though feel talk bird
soon body dog family direct pose leave song measure state product black short street photo photograph of sitting
standing wearing holding cute beautiful colorful purple green blue yellow orange pink brown grey golden silver toy hat
table chair beach snow grass jungle floor wooden cobblestone stars sky forest garden park kitchen desert background
cartoon style high quality blurry bad ugly
"""


def _corpus() -> list[str]:
    world = SpriteWorld(seed=7)
    nouns = " ".join(CATEGORIES)
    return [world.sample(i).caption for i in range(600)] + [nouns] * 40 + [COMMON_WORDS] * 3


def train_tokenizer(folder: Path) -> None:
    """Train the tokenizer and save vocab.json, merges.txt and its configuration to `folder`."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2200, min_frequency=2, end_of_word_suffix="</w>", show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(_corpus(), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
    vocab_path, merges_path = folder / "vocab.json", folder / "merges.txt"
    folder.mkdir(parents=True, exist_ok=True)
    vocab_path.write_text(json.dumps(_vocabulary(merges), ensure_ascii=False))
    merges_path.write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    tokenizer = CLIPTokenizer(vocab=str(vocab_path), merges=str(merges_path), model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(folder)


def _vocabulary(merges: list[tuple[str, ...]]) -> dict[str, int]:
    """Token -> id in CLIP's order: bytes, bytes that end a word, merges, special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    unique = dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"])
    return {token: i for i, token in enumerate(unique)}


def load_tokenizer(out: Path) -> CLIPTokenizer:
    """Load the tokenizer from `out/tokenizer`. If it does not exist, train it first, which takes a few seconds."""
    folder = out / "tokenizer"
    if not folder.exists():
        train_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)
