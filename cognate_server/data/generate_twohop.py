"""Generated two-hop questions over a small invented world: a new one for every row.

Each row builds towns, people, books, firms and museums with unlike titles, writes a paragraph for each, and asks for
something that two of the paragraphs tell together. The supporting facts are named as the paragraphs are written, so
they cannot point at the wrong sentence.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cognate_server.data.words import (
    ADJECTIVES,
    CODAS,
    COLLECTIONS,
    CRAFTS,
    FIRM_ENDS,
    FIRST,
    GOODS,
    MIDDLES,
    NOUNS,
    ONSETS,
    REGION_ENDS,
    SUBJECTS,
    SURNAME_ENDS,
    TOWN_ENDS,
)


@dataclass
class _Page:
    """A paragraph in the making; `facts` maps what a sentence tells to its number."""

    title: str
    sentences: list[str] = field(default_factory=list)
    facts: dict[str, int] = field(default_factory=dict)

    def say(self, sentence: str, *tells: str) -> None:
        for told in tells:
            self.facts[told] = len(self.sentences)
        self.sentences.append(f" {sentence}" if self.sentences else sentence)


@dataclass
class _Town:
    page: _Page
    region: str
    river: str
    founded: str
    goods: str


@dataclass
class _Person:
    page: _Page
    town: _Town
    craft: str
    born: int


@dataclass
class _Work:
    """A book, firm or museum: something with a maker or a place, and a year."""

    page: _Page
    person: _Person
    town: _Town
    year: str


@dataclass
class _Asked:
    question: str
    answer: str
    kind: str
    facts: list[tuple[_Page, str]]


def twohop_row(rng: random.Random) -> dict[str, object]:
    """Return one question as a row in the official form, with two gold paragraphs and two to six others."""
    world = _World(rng)
    asked = rng.choice(_QUESTIONS)(world)
    gold = {page.title: page for page, _ in asked.facts}
    others = [page for page in world.distractors() if page.title not in gold]
    pages = [*gold.values(), *rng.sample(others, rng.randint(2, min(6, len(others))))]
    rng.shuffle(pages)
    return {
        "_id": f"{rng.getrandbits(96):024x}",
        "question": asked.question,
        "answer": asked.answer,
        "type": asked.kind,
        "level": "hard" if len(pages) > 5 else "medium",
        "supporting_facts": [[page.title, page.facts[told]] for page, told in asked.facts],
        "context": [[page.title, page.sentences] for page in pages],
    }


class _World:
    """Invented places, people and works; no name is used twice."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._taken: set[str] = set()
        self.pages: list[_Page] = []

    def distractors(self) -> list[_Page]:
        """Return every page, with some that have nothing to do with the question."""
        makers: list[Callable[[], object]] = [self.town, self.person, self.book, self.firm, self.museum]
        for make in self.rng.sample(makers, 2):
            make()
        return self.pages

    def _name(self, ends: Sequence[str]) -> str:
        while True:
            rng = self.rng
            name = rng.choice(ONSETS) + rng.choice(MIDDLES) + rng.choice(CODAS)
            name += (rng.choice(MIDDLES) + rng.choice(CODAS) if rng.random() < 0.2 else "") + rng.choice(ends)
            if name not in self._taken:
                self._taken.add(name)
                return name

    def _page(self, title: str) -> _Page:
        page = _Page(title)
        self.pages.append(page)
        return page

    def town(self) -> _Town:
        rng = self.rng
        town = _Town(
            page=self._page(self._name(TOWN_ENDS)),
            region=self._name(REGION_ENDS),
            river=self._name(["a", "e", "o"]),
            founded=str(rng.randint(900, 1890)),
            goods=rng.choice(GOODS),
        )
        title, page = town.page.title, town.page
        page.say(
            rng.choice(
                (
                    f"{title} is a town in the region of {town.region}.",
                    f"{title} is a small market town in {town.region}.",
                )
            ),
            "region",
        )
        page.say(
            rng.choice((f"It lies on the river {town.river}.", f"The river {town.river} flows through it.")), "river"
        )
        page.say(
            rng.choice((f"The town was founded in {town.founded}.", f"It was first settled in {town.founded}.")),
            "founded",
        )
        page.say(
            rng.choice((f"It is known for its {town.goods}.", f"{title} sells {town.goods} far and wide.")), "goods"
        )
        return town

    def person(self, town: _Town | None = None) -> _Person:
        rng, town = self.rng, town or self.town()
        name = f"{rng.choice(FIRST)} {self._name(SURNAME_ENDS)}"
        person = _Person(page=self._page(name), town=town, craft=rng.choice(CRAFTS), born=rng.randint(1700, 1990))
        place = town.page.title
        if rng.random() < 0.5:
            person.page.say(f"{name} (born {person.born} in {place}) was {_a(person.craft)}.", "born", "town", "craft")
        else:
            person.page.say(f"{name} was {_a(person.craft)}.", "craft")
            person.page.say(
                rng.choice(
                    (
                        f"Born in {person.born}, {name.split()[0]} came from {place}.",
                        f"{name.split()[0]} was born in {place} in {person.born}.",
                    )
                ),
                "born",
                "town",
            )
        person.page.say(
            rng.choice(
                (
                    f"The first teacher of {name.split()[1]} was {_a(rng.choice(CRAFTS))}.",
                    f"{name.split()[1]} never married.",
                    f"A street in {self._name(TOWN_ENDS)} bears this name.",
                )
            )
        )
        return person

    def book(self) -> _Work:
        rng, person = self.rng, self.person()
        title = f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} of {self._name(TOWN_ENDS)}"
        work = _Work(
            page=self._page(title), person=person, town=person.town, year=str(person.born + rng.randint(20, 70))
        )
        name = person.page.title
        work.page.say(rng.choice((f"{title} is a novel by {name}.", f"{title} is a book written by {name}.")), "maker")
        work.page.say(f"It appeared in {work.year} and tells of {rng.choice(SUBJECTS)}.", "year")
        return work

    def firm(self) -> _Work:
        rng, person, town = self.rng, self.person(), self.town()
        title = f"{self._name(SURNAME_ENDS)} {rng.choice(FIRM_ENDS)}"
        work = _Work(page=self._page(title), person=person, town=town, year=str(person.born + rng.randint(20, 60)))
        work.page.say(f"{title} is a maker of {rng.choice(GOODS)} based in {town.page.title}.", "town")
        work.page.say(
            rng.choice(
                (
                    f"It was founded in {work.year} by {person.page.title}.",
                    f"{person.page.title} founded the firm in {work.year}.",
                )
            ),
            "maker",
            "year",
        )
        return work

    def museum(self) -> _Work:
        rng, town = self.rng, self.town()
        title = f"{self._name(SURNAME_ENDS)} Museum"
        work = _Work(page=self._page(title), person=self.person(), town=town, year=str(rng.randint(1850, 2015)))
        work.page.say(f"The {title} holds a collection of {rng.choice(COLLECTIONS)}.")
        work.page.say(
            rng.choice((f"It stands in {town.page.title}.", f"Its home is the town of {town.page.title}.")), "town"
        )
        work.page.say(f"It opened in {work.year}.", "year")
        return work


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _about_town(world: _World, town: _Town, phrase: str, via: tuple[_Page, str]) -> _Asked:
    """Ask something about the town that `phrase` describes and `via` names."""
    told, question, answer = world.rng.choice(
        (
            ("region", f"In which region lies {phrase}?", town.region),
            ("region", f"{phrase[0].upper()}{phrase[1:]} belongs to which region?", town.region),
            ("river", f"Which river flows through {phrase}?", town.river),
            ("river", f"On which river is {phrase}?", town.river),
            ("founded", f"When was {phrase} founded?", town.founded),
            ("goods", f"What is {phrase} known for?", town.goods),
        )
    )
    return _Asked(question, answer, "bridge", [via, (town.page, told)])


def _birthplace(world: _World) -> _Asked:
    person = world.person()
    name = person.page.title
    phrase = world.rng.choice(
        (f"the town where {name} was born", f"the birthplace of {name}", f"the native town of {name}")
    )
    return _about_town(world, person.town, phrase, (person.page, "town"))


def _site(world: _World) -> _Asked:
    work = world.museum() if world.rng.random() < 0.5 else world.firm()
    title = work.page.title
    phrase = world.rng.choice((f"the town that is home to {title}", f"the town where {title} is found"))
    return _about_town(world, work.town, phrase, (work.page, "town"))


def _maker(world: _World) -> _Asked:
    is_book = world.rng.random() < 0.5
    work = world.book() if is_book else world.firm()
    person, title = work.person, work.page.title
    phrase = f"the author of {title}" if is_book else f"the founder of {title}"
    told, question, answer = world.rng.choice(
        (
            ("town", f"Where was {phrase} born?", person.town.page.title),
            ("town", f"In which town was {phrase} born?", person.town.page.title),
            ("born", f"In which year was {phrase} born?", str(person.born)),
            ("craft", f"What was the profession of {phrase}?", person.craft),
        )
    )
    return _Asked(question, answer, "bridge", [(work.page, "maker"), (person.page, told)])


def _older(world: _World) -> _Asked:
    one, two = world.person(), world.person()
    while one.born == two.born:
        two = world.person()
    first, last = sorted((one, two), key=lambda person: person.born)
    names = f"{one.page.title} or {two.page.title}"
    question, person = world.rng.choice(
        (
            (f"Who was born first, {names}?", first),
            (f"Who is older, {names}?", first),
            (f"Who was born later, {names}?", last),
            (f"Who is younger, {names}?", last),
        )
    )
    facts = [(one.page, "born"), (two.page, "born")]
    # The person's name has to stand in a supporting sentence, and not every birth sentence has it.
    if person.page.title not in person.page.sentences[person.page.facts["born"]]:
        facts.append((person.page, "craft"))
    return _Asked(question, person.page.title, "comparison", facts)


def _alike(world: _World) -> _Asked:
    one, two = world.person(), world.person()
    if world.rng.random() < 0.5:
        two = world.person(one.town)
    pair = f"{one.page.title} and {two.page.title}"
    answer = "yes" if one.town is two.town else "no"
    question = world.rng.choice((f"Were {pair} born in the same town?", f"Do {pair} share a birthplace?"))
    return _Asked(question, answer, "comparison", [(one.page, "town"), (two.page, "town")])


# Bridges outnumber comparisons about four to one, as people ask them.
_QUESTIONS = (_birthplace, _birthplace, _site, _site, _maker, _maker, _maker, _older, _alike)
