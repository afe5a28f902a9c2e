# SPDX-License-Identifier: Apache-2.0
"""The words of the instructions and captions, and the tokenizers of the tiny models.

The CLIP tokenizer is a byte-pair encoding trained on the words, so that each of them is one token; the T5 tokenizer
is a unigram model with a piece for each word and one for each printable ASCII character, for anything else. Qwen's
knows the words and the pieces of QwenImageEditPipeline's prompt template, nothing else; FLUX.2-klein's the words and
those of its chat template.
"""

import json
import re
import string
from functools import lru_cache
from pathlib import Path

DATA = Path(__file__).parent / "data"
NAMES = json.loads((DATA / "sprites.json").read_text())["names"]
COLORS = ("red", "yellow", "green", "blue", "purple", "gray")
PLACES = ("top left", "top right", "bottom left", "bottom right", "center")
GLOBALS = ("night", "warm", "cold", "green", "snow")

TEMPLATES = {
    "replace": ("replace the {a} with {b}", "turn the {a} into {b}", "change the {a} to {b}"),
    "remove": ("remove the {a}", "delete the {a}", "take away the {a}"),
    "recolor": ("make the {a} {c}", "color the {a} {c}", "paint the {a} {c}"),
    "add": ("add {b} in the {p}", "put {b} in the {p}", "place {b} in the {p}"),
    "add_open": ("add {b}", "put {b} somewhere", "place {b} in the picture"),
    "night": ("make it night", "turn day into night", "change the scene to night"),
    "warm": ("give it a warm tint", "make the picture warm", "add a warm tint"),
    "cold": ("give it a cold tint", "make the picture cold", "add a cold tint"),
    "green": ("give it a green tint", "make the picture green", "add a green tint"),
    "snow": ("make it snow", "let it snow", "add snow to the scene"),
}

CLIP_LENGTH = 77  # what the pipelines pad CLIP's prompt to
PHRASE_LENGTH = 16  # room for the longest phrase with its end token in T5's ids
CAPTION_LENGTH = 40  # the same of the longest caption
QWEN_LENGTH = 24  # room for the longest prompt in Qwen's ids, from the picture's token on; a multiple of 8
QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
KLEIN_LENGTH = 24  # room for the longest phrase in klein's chat template
KLEIN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
# What Qwen3's own makes of one user's turn without thinking.
KLEIN_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
QWEN_PIECES = r"\n|'s|\w+|[^\w\s]+"


def article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def phrase(task, variant, a=None, b=None, c=None, p=None):
    """The instruction of an edit. a, b: object names; c: a colour; p: a place; variant: which of three phrasings."""
    return TEMPLATES[task][variant].format(a=a, b=article(b) if b else None, c=c, p=p)


def caption(background, objects):
    """The caption of a scene, in the words of the instructions alone.

    background: a colour of COLORS, None for a photograph. objects: (name, colour or None, place) of each."""
    parts = ["a picture" if background is None else f"{article(background)} scene"]
    for name, color, place in objects:
        noun = name if color is None else f"{color} {name}"
        parts.append(f"with {article(noun)} in the {place}")
    return " ".join(parts)


def words():
    """Every word of every instruction, sorted."""
    found = {"a", "an", *NAMES, *COLORS}
    for place in PLACES:
        found.update(place.split())
    for templates in TEMPLATES.values():
        for template in templates:
            found.update(word for word in template.split() if not word.startswith("{"))
    return sorted(found)


def train_clip_pieces():
    """Writes data/clip_bpe.json: pieces and merges that make one token of each word.

    Kept as data, because the trainer breaks ties by hash order and no two runs agree.
    """
    from tokenizers import Tokenizer, models, normalizers, trainers
    from transformers import CLIPTokenizer

    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    alphabet = [c for c in string.printable if c.isprintable() and not c.isspace() and not c.isupper()]
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    trained.train_from_iterator([" ".join(words() + alphabet)], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    (DATA / "clip_bpe.json").write_text(json.dumps({"pieces": pieces, "merges": merges}) + "\n")


@lru_cache(maxsize=1)
def clip_tokenizer():
    """CLIPTokenizer with `<|endoftext|>` as its last id: transformers pools at the first one, but at the
    largest id where the configuration says 2."""
    from transformers import CLIPTokenizer

    kept = json.loads((DATA / "clip_bpe.json").read_text())
    pieces = ["<|unknown|>", "<|startoftext|>", *kept["pieces"], "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[tuple(merge) for merge in kept["merges"]],
        unk_token="<|unknown|>",
        model_max_length=CLIP_LENGTH,
    )


@lru_cache(maxsize=1)
def t5_tokenizer():
    """T5Tokenizer; words also with a capital, since T5 keeps the case."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    listed = words()
    capital = [word.capitalize() for word in listed]
    pieces += [("\u2581" + word, -2.0) for word in [*listed, *capital]]
    # A character must cost more than any word, so that a word is never spelt.
    pieces += [(c, -100.0) for c in ["\u2581", *(c for c in string.printable if c.isprintable() and c != " ")]]
    seen = dict.fromkeys(piece for piece, _ in pieces)
    scores = dict(reversed(pieces))
    return T5Tokenizer(vocab=[(piece, scores[piece]) for piece in seen], extra_ids=0, model_max_length=512)


class PhraseEncoder:
    """The tokenizers' ids of an instruction, by look-up: 2 us instead of 100 us a phrase.

    texts: the method of Edits that gives the texts of each edit; length: of T5's ids."""

    texts, length = "instructions", PHRASE_LENGTH

    def __init__(self):
        clip, t5 = clip_tokenizer(), t5_tokenizer()
        self.clip_vocab_size, self.t5_vocab_size = len(clip), len(t5)
        self.clip_bos, self.clip_eos = clip.bos_token_id, clip.eos_token_id
        self.t5_pad, self.t5_eos = t5.pad_token_id, t5.eos_token_id
        self._clip, self._t5 = {}, {}
        for word in [*words(), "."]:
            self._clip[word] = self._only(clip(word, add_special_tokens=False).input_ids, word)
        for word in words():
            for form in (word, word.capitalize()):
                self._t5[form] = self._only(t5(form, add_special_tokens=False).input_ids, form)
        self._t5["."] = t5.convert_tokens_to_ids(".")

    @staticmethod
    def _only(ids, word):
        if len(ids) != 1:
            raise ValueError(f"the word {word!r} must be one token, got {len(ids)}")
        return ids[0]

    def __call__(self, phrase, capital=False, stop=False):
        """(clip ids, length CLIP_LENGTH; t5 ids, as long as `length`), padded."""
        parts = phrase.split()
        clip = [self.clip_bos, *(self._clip[w] for w in parts), *([self._clip["."]] if stop else [])]
        if capital:
            parts = [parts[0].capitalize(), *parts[1:]]
        t5 = [*(self._t5[w] for w in parts), *([self._t5["."]] if stop else []), self.t5_eos]
        clip += [self.clip_eos] * (CLIP_LENGTH - len(clip))
        return clip, t5 + [self.t5_pad] * (self.length - len(t5))


class CaptionEncoder(PhraseEncoder):
    """The same of captions, of which an edit has two: the source's and the target's."""

    texts, length = "captions", CAPTION_LENGTH


@lru_cache(maxsize=1)
def qwen_template():
    """(QwenImageEditPipeline's prompt template, how many of its first tokens the pipeline drops)."""
    from diffusers import QwenImageEditPipeline

    bare = QwenImageEditPipeline(None, None, None, None, None, None)
    return bare.prompt_template_encode, bare.prompt_template_encode_start_idx


def _word_tokenizer(special, fixed, length):
    """A token for each special piece, word, number or run of signs. Case is ignored. fixed: pieces beside words()."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = dict.fromkeys([*special, "<unk>", *fixed, *words()])
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(QWEN_PIECES), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=list(special[1:]),
        padding_side="right",
        model_max_length=length,
    )


@lru_cache(maxsize=1)
def qwen_tokenizer():
    """As Qwen's own tokenizer has the pieces of the pipeline's template, of which the pipeline counts tokens."""
    fixed = re.findall(QWEN_PIECES, re.sub(r"<\|\w+\|>", " ", qwen_template()[0]).lower())
    return _word_tokenizer(QWEN_SPECIAL, fixed, 1024)


@lru_cache(maxsize=1)
def klein_tokenizer():
    """With the chat template that Flux2KleinPipeline asks for."""
    tokenizer = _word_tokenizer(KLEIN_SPECIAL, ["user", "assistant", "\n", "."], 512)
    tokenizer.chat_template = KLEIN_TEMPLATE
    return tokenizer


class QwenPhraseEncoder:
    """The ids of an instruction in the pipeline's template, by look-up. prefix: those that the pipeline drops."""

    texts = "instructions"

    def __init__(self):
        tokenizer = qwen_tokenizer()
        template, dropped = qwen_template()
        before, after = (tokenizer(part).input_ids for part in template.split("{}"))
        self.vocab_size, self.pad = len(tokenizer), tokenizer.pad_token_id
        self.prefix, self._head, self._tail = before[:dropped], before[dropped:], after
        if self._head[:1] != [tokenizer.convert_tokens_to_ids("<|vision_start|>")]:
            raise ValueError(f"the pipeline drops {dropped} tokens of its template, but the picture starts elsewhere")
        self._words = {word: tokenizer.convert_tokens_to_ids(word) for word in [*words(), "."]}

    def __call__(self, phrase, capital=False, stop=False):
        """(ids from the picture's token on, padded to QWEN_LENGTH,); a capital changes nothing."""
        ids = [self._words[word] for word in phrase.split()] + [self._words["."]] * stop
        ids = [*self._head, *ids, *self._tail]
        return (ids + [self.pad] * (QWEN_LENGTH - len(ids)),)


class KleinPhraseEncoder:
    """The ids of an instruction in the chat template, by look-up."""

    texts = "instructions"

    def __init__(self):
        tokenizer = klein_tokenizer()
        text = tokenizer.apply_chat_template([{"role": "user", "content": "{}"}], tokenize=False)
        self._head, self._tail = (tokenizer(part).input_ids for part in text.split("{}"))
        self.vocab_size, self.pad = len(tokenizer), tokenizer.pad_token_id
        self._words = {word: tokenizer.convert_tokens_to_ids(word) for word in [*words(), "."]}

    def __call__(self, phrase, capital=False, stop=False):
        """(ids, padded to KLEIN_LENGTH,); a capital changes nothing."""
        ids = [self._words[word] for word in phrase.split()] + [self._words["."]] * stop
        ids = [*self._head, *ids, *self._tail]
        return (ids + [self.pad] * (KLEIN_LENGTH - len(ids)),)
