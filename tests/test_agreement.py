"""The embedded task: labels re-derived by a parser of its own, held-out words, no shortcuts."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict
from typing import Any

import pytest

from searchpet.tasks import agreement

SPLITS = ("train", "validation", "test")
PLURALS = {
    "men": "man", "women": "woman", "gentlemen": "gentleman", "policemen": "policeman",
    "policewomen": "policewoman", "wives": "wife", "knives": "knife",
}
ENDINGS = (  # of verbs: ending, what it stands for, form
    ("s", "", "s"), ("es", "", "s"), ("ies", "y", "s"), ("ing", "", "ing"), ("ing", "e", "ing"),
    ("ed", "", "past"), ("d", "", "past"), ("ied", "y", "past"),
)


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    return agreement.load()


class Parser:
    """A second reading of the grammar: surface words in, broken rules out.

    It knows the base forms of a split and its own morphology, and nothing of how, or from which
    phenomenon, a sentence was made.
    """

    def __init__(self, split: str) -> None:
        self.lexicon = {kind: set(words.split()) for kind, words in agreement.WORDS[split].items()}

    def broken(self, text: str) -> list[str]:
        """Rules that the sentence breaks."""
        assert text[0].isupper() and text.endswith("."), text
        self.words = text[:-1].lower().split()
        rules = self.sentence()
        assert not self.words, (text, self.words)
        return rules

    def take(self, *allowed: str) -> str:
        assert self.words and (not allowed or self.words[0] in allowed), (self.words, allowed)
        return self.words.pop(0)

    def peek(self, *words: str) -> bool:
        return bool(self.words) and self.words[0] in words

    def noun(self, *kinds: str) -> tuple[bool, str]:
        """(is it plural, class)"""
        word = self.take()
        stems = [(word, False), (PLURALS.get(word, ""), True)]
        for end, base in (("s", ""), ("es", ""), ("ies", "y")):
            if word.endswith(end) and word not in PLURALS:
                stems.append((word.removesuffix(end) + base, True))
        found = {(plural, k) for stem, plural in stems for k in kinds if stem in self.lexicon[k]}
        assert len(found) == 1, (word, found)
        return found.pop()

    def verb(self, *kinds: str) -> tuple[str, str]:
        """(form: bare, s, ing or past; class)"""
        word = self.take()
        stems = [(word, "bare")]
        for end, base, form in ENDINGS:
            if word.endswith(end):
                stems.append((word.removesuffix(end) + base, form))
        found = {(form, k) for stem, form in stems for k in kinds if stem in self.lexicon[k]}
        assert len(found) == 1, (word, found)
        return found.pop()

    def phrase(self) -> tuple[str, bool, str]:
        """(determiner, is it plural, class)"""
        return self.take("the", "no"), *self.noun("person", "male", "female")

    def sentence(self) -> list[str]:
        det, plural, kind = self.phrase()
        if self.peek("that"):
            self.take()
            lacks_subject = not self.peek("the", "no")
            if not lacks_subject:
                self.phrase()
            assert self.verb("treat") == ("past", "treat")
            if lacks_subject:
                self.phrase()
        elif self.peek("near", "behind", "beside"):
            self.take()
            self.phrase()
        return self.predicate(det, plural, kind)

    def predicate(self, det: str, plural: bool, kind: str) -> list[str]:
        if self.peek("has", "have", "is", "are", "was", "were"):
            auxiliary = self.take()
            rules = ["verb"] * ((auxiliary in ("have", "are", "were")) != plural)
            if auxiliary in ("has", "have") and self.peek("ever"):
                rules += ["polarity"] * (self.take() == "ever" and det != "no")
            form = "past" if auxiliary in ("has", "have") else "ing"
            assert self.verb("act") == (form, "act")
            return rules
        form, verb_kind = self.verb("act", "treat", "handle")
        if verb_kind == "act":
            assert form in ("bare", "s")
            return ["verb"] * ((form == "bare") != plural)
        assert form == "past"
        if self.peek("himself", "herself", "themselves"):
            word = self.take()
            right = "themselves" if plural else {"male": "himself", "female": "herself"}[kind]
            return ["reflexive"] * (word != right)
        if self.peek("any"):
            self.take()
            assert self.noun("thing")[0]
            return ["polarity"] * (det != "no")
        these = self.take("this", "these") == "these"
        while self.peek(*self.lexicon["adjective"]):
            self.take()
        return ["determiner"] * (self.noun("thing")[0] != these)


@pytest.mark.parametrize(("text", "rules"), [
    ("The teacher near the doctors laughs.", []),
    ("The teacher near the doctors laugh.", ["verb"]),
    ("The teachers have listened.", []),
    ("No teachers that the doctor thanked was dancing.", ["verb"]),
    ("No women that the kings admired blamed themselves.", []),
    ("No women that the kings admired blamed himself.", ["reflexive"]),
    ("The king that admired the woman blamed herself.", ["reflexive"]),
    ("The teacher that no doctors thanked has ever danced.", ["polarity"]),
    ("No teacher that thanked the doctors painted any boxes.", []),
    ("The teachers that thanked no doctors moved any boxes.", ["polarity"]),
    ("The teacher near the doctors painted these small red box.", ["determiner"]),
])
def test_the_parser_knows_the_rules(text: str, rules: list[str]) -> None:
    assert Parser("train").broken(text) == rules


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("seed", [0, 1])
def test_labels_are_what_an_independent_parser_says(split: str, seed: int) -> None:
    parser = Parser(split)
    for row in agreement.load(seed)[split]:
        rules = parser.broken(row["text"])
        assert len(rules) == 1 - row["label"], (row, rules)
        assert not rules or row["phenomenon"].startswith(rules[0]), (row, rules)


def test_sizes_and_balance(raw: dict[str, Any]) -> None:
    assert {split: len(raw[split]) for split in SPLITS} == {
        "train": 4000, "validation": 800, "test": 800,
    }
    assert raw["meta"]["labels"] == ["unacceptable", "acceptable"]
    for split in SPLITS:
        counts = Counter((row["phenomenon"], row["label"]) for row in raw[split])
        assert len(counts) == 2 * len(agreement.PHENOMENA) and len(set(counts.values())) == 1


def test_pairs_stay_in_one_split_and_have_one_length(raw: dict[str, Any]) -> None:
    pairs = defaultdict(list)
    for split in SPLITS:
        for row in raw[split]:
            pairs[row["pair"]].append((split, row["phenomenon"], row["label"], row["text"]))
    for rows in pairs.values():
        (split, phenomenon, label, text), (split2, phenomenon2, label2, text2) = rows
        assert (split, phenomenon, label) == (split2, phenomenon2, 1 - label2)
        a, b = text.lower().split(), text2.lower().split()
        assert len(a) == len(b) and 1 <= sum(x != y for x, y in zip(a, b, strict=True)) <= 2


def test_no_sentence_comes_twice(raw: dict[str, Any]) -> None:
    texts = [row["text"].lower() for split in SPLITS for row in raw[split]]
    assert len(set(texts)) == len(texts)


def test_content_words_are_held_out(raw: dict[str, Any]) -> None:
    grammar = {
        "the", "no", "that", "near", "behind", "beside", "this", "these", "himself", "herself",
        "themselves", "is", "are", "was", "were", "has", "have", "ever", "any",
    }
    used = {s: {w for r in raw[s] for w in r["text"][:-1].lower().split()} for s in SPLITS}
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert used[a] & used[b] <= grammar
        bases = [set(" ".join(agreement.WORDS[s].values()).split()) for s in (a, b)]
        assert not bases[0] & bases[1]


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_counting_words_and_neighbours_falls_far_short(raw: dict[str, Any], longest: int) -> None:
    """Logistic regression on n-gram counts, sentence ends included, against 0.95 fine-tuned.

    Measured on validation, with the best of C = 0.01, 0.1, 1: 0.62 words, 0.64 bigrams, 0.63
    trigrams.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    counts = CountVectorizer(ngram_range=(1, longest), token_pattern=r"\S+")
    texts = {s: [f"<s> {r['text'][:-1]} </s>" for r in raw[s]] for s in SPLITS}
    labels = {s: [r["label"] for r in raw[s]] for s in SPLITS}
    model = LogisticRegression(max_iter=300).fit(
        counts.fit_transform(texts["train"]), labels["train"]
    )
    for split in ("validation", "test"):
        assert model.score(counts.transform(texts[split]), labels[split]) <= 0.68


def test_it_is_fast_and_a_function_of_the_seed(raw: dict[str, Any]) -> None:
    start = time.perf_counter()
    again = agreement.load()
    assert time.perf_counter() - start < 1.0
    assert again == raw and agreement.load(1)["train"] != raw["train"]


def test_a_change_of_content_changes_the_version(raw: dict[str, Any]) -> None:
    """The sha256 of seed 0's rows; update it together with VERSION."""
    digest = hashlib.sha256(json.dumps([raw[s] for s in SPLITS]).encode()).hexdigest()
    assert (raw["meta"]["version"], digest[:16]) == ("1.0.0", "eb361dc59ae8ad30")
