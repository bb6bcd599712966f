"""Grammatical acceptability, generated: agreement and licensing across a distance.

Minimal pairs (one acceptable sentence, one not) in the manner of BLiMP (Warstadt et al. 2020,
arXiv:1912.00582), from this file's own grammar and vocabulary.  Differences: a binary label for
each sentence instead of a preference within the pair, and held-out words instead of templates.

    S    -> Subj Pred "."
    Subj -> Det N [ Prep Det N | "that" V-past Det N | "that" Det N V-past ]      Det -> the | no
    Pred -> V-present | (is | are | was | were) V-ing | (has | have) ["ever"] V-past
          | V-past (this | these) Adj* N | V-past Reflexive | V-past "any" N

The noun of the modifier is the attractor: its number, gender and determiner are drawn whatever
those of the head are.  Nouns, verbs and adjectives of one split are in no other.

Singulars are somewhat more frequent than plurals, and an initial `no` tells the label in one
phenomenon of eight, so n-gram counts are right about 0.62 of the time.  That is on purpose, as
training needs a slope to begin on: with all of it balanced, a few thousand trained parameters
stayed at chance for hundreds of steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

VERSION = "1.0.0"  # changes whenever a seed would give other sentences
PAIRS = {"train": 2000, "validation": 400, "test": 400}
LABELS = ("unacceptable", "acceptable")

# split -> word class -> base forms; `act` takes no object, `treat` a person, `handle` a thing
WORDS: dict[str, dict[str, str]] = {
    "train": {
        "person": "teacher doctor lawyer farmer artist baker banker barber builder butcher "
                  "captain carpenter clerk coach dancer dentist designer driver editor engineer "
                  "gardener guard guest hunter inventor judge manager merchant miner musician "
                  "neighbor nurse painter philosopher pilot poet prisoner professor sailor",
        "male": "man king brother father actor husband uncle wizard monk prince",
        "female": "woman queen sister mother actress wife aunt witch nun princess",
        "thing": "chair table lamp bottle basket blanket book box candle carpet clock coat cup "
                 "curtain desk drum guitar hammer hat jacket",
        "act": "laugh smile dance walk work talk travel shout wait listen cry jump cough rest "
               "complain sneeze dream march vote relax",
        "treat": "admire help follow visit thank blame praise watch call warn trust remember "
                 "describe defend ignore invite mention notice observe respect",
        "handle": "paint clean move carry open repair return examine borrow order",
        "adjective": "small red old heavy expensive broken clean strange beautiful green cheap "
                     "simple dirty wooden empty modern",
    },
    "validation": {
        "person": "writer singer soldier student tailor tourist waiter worker author chemist cook "
                  "customer director firefighter janitor journalist",
        "male": "boy son nephew grandfather duke",
        "female": "girl daughter niece grandmother duchess",
        "thing": "mirror phone picture plate pillow ring shirt spoon statue toy",
        "act": "whisper yell sail climb arrive gamble pray yawn appear wander",
        "treat": "like hate amuse doubt question accuse greet support scare recognize",
        "handle": "wash push deliver lift damage collect",
        "adjective": "large blue new light fancy yellow soft round",
    },
    "test": {
        "person": "librarian lifeguard mayor mechanic minister opponent officer plumber president "
                  "programmer reporter senator sheriff surgeon visitor voter",
        "male": "gentleman grandson policeman bridegroom emperor",
        "female": "lady granddaughter policewoman bride empress",
        "thing": "bag ball bench camera flag glove kettle knife ladder umbrella",
        "act": "giggle stumble hesitate argue vanish rush cheer skate improve protest",
        "treat": "adore annoy attack bother embarrass encourage impress insult love pity",
        "handle": "polish pull purchase store touch inspect",
        "adjective": "tall black ugly shiny plain white tiny square",
    },
}

IRREGULAR = {
    "man": "men", "woman": "women", "gentleman": "gentlemen", "policeman": "policemen",
    "policewoman": "policewomen", "wife": "wives", "knife": "knives",
}
PREPOSITIONS = ("near", "behind", "beside")  # not `with`: many accept a plural verb after it
PLURAL = 0.38  # share of plurals; at 0.5 no word tells anything by itself
ANY_MODIFIER = "none none near that_s that_o"  # bare subjects twice: they show what agrees
REFLEXIVES = {"male": "himself", "female": "herself"}


def with_s(word: str) -> str:
    """Plural of a noun, or present tense of a verb after a singular subject."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def past(verb: str) -> str:
    """Past tense, and participle, of a verb of WORDS: all are regular."""
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + ("d" if verb.endswith("e") else "ed")


def progressive(verb: str) -> str:
    """The -ing form of a verb of WORDS."""
    return f"{verb.removesuffix('e')}ing"


class Draw:
    """Free choices from the words of one split."""

    def __init__(self, words: dict[str, str], rng: random.Random) -> None:
        self.words = {kind: text.split() for kind, text in words.items()}
        self.rng = rng

    def coin(self) -> bool:
        """True or False, equally often."""
        return self.rng.random() < 0.5

    def plural(self) -> bool:
        """True in a PLURAL of the cases."""
        return self.rng.random() < PLURAL

    def word(self, kind: str) -> str:
        """Any word of a class, in its base form."""
        return self.rng.choice(self.words[kind])

    def subject(self, modifiers: str = ANY_MODIFIER, kind: str = "person") -> Subject:
        """A subject with a modifier, of any number; `kind` is the class of both its nouns."""
        modifier = self.rng.choice(modifiers.split())
        near = modifier == "near"
        return Subject(
            "no" if self.coin() else "the", self.word(kind), self.plural(), modifier,
            self.rng.choice(PREPOSITIONS) if near else past(self.word("treat")),
            "no" if self.coin() and not near else "the", self.word(kind), self.plural(),
        )


@dataclass(frozen=True)
class Subject:
    """Head noun and attractor, with determiner and number each; `link` stands between them."""

    det: str
    noun: str
    plural: bool
    modifier: str  # none; near: a preposition; that_s, that_o: a clause, by what it lacks
    link: str
    other_det: str
    other: str
    other_plural: bool

    def __str__(self) -> str:
        head = f"{self.det} {with_s(self.noun) if self.plural else self.noun}"
        other = f"{self.other_det} {with_s(self.other) if self.other_plural else self.other}"
        if self.modifier == "none":
            return head
        if self.modifier == "near":
            return f"{head} {self.link} {other}"
        clause = f"{self.link} {other}" if self.modifier == "that_s" else f"{other} {self.link}"
        return f"{head} that {clause}"


Pair = tuple[str, str]  # acceptable, unacceptable


def verb_agreement(modifier: str) -> Callable[[Draw], Pair]:
    """The verb agrees with the head noun, not with the attractor."""

    def draw(d: Draw) -> Pair:
        subject, verb = d.subject(modifier), d.word("act")
        forms = d.rng.choice((
            (with_s(verb), verb),
            (f"is {progressive(verb)}", f"are {progressive(verb)}"),
            (f"was {progressive(verb)}", f"were {progressive(verb)}"),
            (f"has {past(verb)}", f"have {past(verb)}"),
        ))
        good, bad = forms[::-1] if subject.plural else forms
        return f"{subject} {good}", f"{subject} {bad}"

    return draw


def determiner(fewest: int, most: int) -> Callable[[Draw], Pair]:
    """This or these agrees with its noun, across `fewest` to `most` adjectives."""

    def draw(d: Draw) -> Pair:
        adjectives = d.rng.sample(d.words["adjective"], d.rng.randint(fewest, most))
        start, noun = f"{d.subject()} {past(d.word('handle'))}", d.word("thing")
        good, bad = "this", "these"
        if d.plural():
            good, bad, noun = bad, good, with_s(noun)
        end = " ".join([*adjectives, noun])
        return f"{start} {good} {end}", f"{start} {bad} {end}"

    return draw


def reflexive_number(d: Draw) -> Pair:
    """The reflexive agrees in number with the subject, not with the attractor."""
    subject, kind, start = _gendered(d)
    forms = (REFLEXIVES[kind], "themselves")
    good, bad = forms[::-1] if subject.plural else forms
    return f"{start} {good}", f"{start} {bad}"


def reflexive_gender(d: Draw) -> Pair:
    """The reflexive agrees in gender with the subject, not with the attractor."""
    subject, kind, start = _gendered(d)
    if subject.plural:
        return reflexive_gender(d)
    bad = REFLEXIVES["female" if kind == "male" else "male"]
    return f"{start} {REFLEXIVES[kind]}", f"{start} {bad}"


def _gendered(d: Draw) -> tuple[Subject, str, str]:
    """Subject, its gender, and the sentence up to the reflexive; the attractor has any gender."""
    kind, other = ("male" if d.coin() else "female" for _ in range(2))
    subject = replace(d.subject(kind=kind), other=d.word(other))
    return subject, kind, f"{subject} {past(d.word('treat'))}"


def polarity(d: Draw) -> Pair:
    """`ever` and `any` need `no` at the subject; at the attractor it does not help."""
    good, bad = _licensed(d)
    if d.coin():
        end = f"{'have' if good.plural else 'has'} ever {past(d.word('act'))}"
    else:
        end = f"{past(d.word('handle'))} any {with_s(d.word('thing'))}"
    return f"{good} {end}", f"{bad} {end}"


def _licensed(d: Draw) -> tuple[Subject, Subject]:
    """A subject with `no` and without; the attractor may have it in either."""
    subject = d.subject("that_s that_o")
    others = d.rng.choice((("the", "no"), ("no", "no"), ("the", "the")))
    good, bad = (replace(subject, other_det=det) for det in others)
    return replace(good, det="no"), replace(bad, det="the")


PHENOMENA: dict[str, Callable[[Draw], Pair]] = {
    "verb_adjacent": verb_agreement("none"),
    "verb_preposition": verb_agreement("near"),
    "verb_relative": verb_agreement("that_s that_o"),
    "determiner_adjacent": determiner(0, 0),
    "determiner_adjective": determiner(1, 2),
    "reflexive_number": reflexive_number,
    "reflexive_gender": reflexive_gender,
    "polarity": polarity,
}


def load(seed: int = 0) -> dict[str, Any]:
    """Rows of each split, {text, label, phenomenon, pair}, and `meta`; a function of the seed.

    Phenomena and labels are balanced in each split; no sentence comes twice.
    """
    splits = {name: _rows(name, random.Random(f"{seed}:{name}")) for name in PAIRS}
    meta = {
        "name": "agreement", "version": VERSION, "type": "classification", "fields": ["text"],
        "label": "label", "labels": list(LABELS), "metrics": ["accuracy"],
    }
    return {**splits, "meta": meta}


def _rows(split: str, rng: random.Random) -> list[dict[str, Any]]:
    draw, names = Draw(WORDS[split], rng), list(PHENOMENA)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for i in range(PAIRS[split]):
        phenomenon = names[i % len(names)]
        good, bad = PHENOMENA[phenomenon](draw)
        while good in seen or bad in seen:
            good, bad = PHENOMENA[phenomenon](draw)
        seen |= {good, bad}
        for label, words in ((1, good), (0, bad)):
            rows.append({"text": f"{words[0].upper()}{words[1:]}.", "label": label,
                         "phenomenon": phenomenon, "pair": f"{split}-{i}"})
    rng.shuffle(rows)
    return rows
