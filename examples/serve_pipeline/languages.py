"""Which language is a text in? By how often which three letters stand together, learnt from a few sentences."""

from __future__ import annotations

import re

import numpy as np

BUCKETS = 2048
"""Trigrams are hashed into so many; the vector's length."""

SENTENCES = {
    "en": "The quick brown fox jumps over the lazy dog. All human beings are born free and equal in dignity and "
    "rights. They are endowed with reason and conscience and should act towards one another in a spirit of "
    "brotherhood. What would you like to drink with your breakfast this morning? There is nothing that we could "
    "have done about it.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt "
    "und sollen einander im Geist der Brüderlichkeit begegnen. Was möchten Sie heute Morgen zum Frühstück trinken? "
    "Der schnelle braune Fuchs springt über den faulen Hund. Daran hätten wir nichts ändern können.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de "
    "conscience et doivent agir les uns envers les autres dans un esprit de fraternité. Que voulez-vous boire ce matin "
    "avec votre petit déjeuner? Nous n'aurions rien pu y faire, et le renard saute par-dessus le chien paresseux.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y "
    "conciencia, deben comportarse fraternalmente los unos con los otros. ¿Qué le gustaría beber esta mañana con el "
    "desayuno? No habríamos podido hacer nada, y el zorro marrón salta sobre el perro perezoso.",
}


def features(text: str) -> np.ndarray:
    """How often each trigram's bucket occurs in a text: float32, length BUCKETS."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    letters = f" {' '.join(words)} "
    counts = np.zeros(BUCKETS, np.float32)
    for i in range(len(letters) - 2):
        a, b, c = (ord(letter) for letter in letters[i : i + 3])
        counts[(a * 961 + b * 31 + c) % BUCKETS] += 1  # not hash(): it differs from process to process
    return counts


class Model:
    """Naive Bayes over :func:`features`."""

    def __init__(self, smoothing: float = 0.1) -> None:
        self.languages = sorted(SENTENCES)
        counts = np.stack([features(SENTENCES[language]) for language in self.languages]) + smoothing
        self.weights = np.log(counts / counts.sum(axis=1, keepdims=True)).T

    def scores(self, batch: list[np.ndarray]) -> list[dict[str, float]]:
        """The probability of each language, for each of several texts at once."""
        logits = np.stack(batch) @ self.weights
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return [dict(zip(self.languages, (round(float(s), 4) for s in row), strict=True)) for row in shares]
