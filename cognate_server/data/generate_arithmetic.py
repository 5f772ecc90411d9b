"""Generated arithmetic word problems. Every result is computed from its expression, never written down twice."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from fractions import Fraction

from cognate_server.data.gsm8k import evaluate
from cognate_server.data.words import (
    DAYS,
    FOODS,
    HOLDERS,
    JOBS,
    NAMES,
    PLACES,
    THINGS,
    VEHICLES,
)


def arithmetic_row(rng: random.Random) -> dict[str, object]:
    """Return one problem as a row with `question` and `answer`."""
    draft = _Draft(rng)
    rng.choice(_FAMILIES)(draft)
    return {"question": " ".join(draft.question), "answer": "\n".join([*draft.steps, f"#### {draft.final}"])}


class _Draft:
    """A problem under construction: sentences of the question, lines of the answer, the last result."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.question: list[str] = []
        self.steps: list[str] = []
        self.final = "0"

    def tell(self, *phrasings: str) -> None:
        """Add one of several ways to say the same to the question."""
        self.question.append(self.rng.choice(phrasings))

    def work(self, expression: str, *phrasings: str, unit: str = "") -> int | Fraction:
        """Add a line with the calculation in place of its `@`, and return the result."""
        value = evaluate(expression)
        self.final = _decimal(value)
        shown = expression.replace("*", " x ") if self.rng.random() < 0.3 else expression
        sign = "$" if unit == "$" else ""
        calculation = f"{shown} = {sign}<<{expression}={self.final}>>{self.final}"
        if unit and unit != "$":
            calculation += f" {unit}"
        self.steps.append(self.rng.choice(phrasings).replace("@", calculation))
        return int(value) if value.denominator == 1 else value

    def number(self, low: int, high: int, step: int = 1) -> int:
        return self.rng.randrange(low, high + 1, step)

    def names(self, count: int) -> list[str]:
        return self.rng.sample(NAMES, count)

    def one(self, words: Sequence[str]) -> str:
        return self.rng.choice(words)


def _decimal(value: Fraction) -> str:
    """Return a terminating decimal; the families choose numbers so that every result is one."""
    if value.denominator == 1:
        return str(value.numerator)
    for digits in range(1, 13):
        scaled = value * 10**digits
        if scaled.denominator == 1:
            sign = "-" if scaled < 0 else ""
            text = str(abs(scaled.numerator)).rjust(digits + 1, "0")
            return f"{sign}{text[:-digits]}.{text[-digits:]}"
    raise AssertionError(f"{value} has no short decimal")


def _stock(d: _Draft) -> None:
    """A quantity changes a few times."""
    (name,), things, day = d.names(1), d.one(THINGS), d.one(DAYS)
    have: int | Fraction = d.number(20, 400)
    d.tell(f"{name} has {have} {things}.", f"On {day}, {name} starts with {have} {things}.")
    for _ in range(d.number(2, 4)):
        friend = d.one([n for n in NAMES if n != name])
        if d.rng.random() < 0.5:
            more = d.number(3, 150)
            d.tell(
                f"{friend} brings {more} more.",
                f"Then {name} finds another {more} {things}.",
                f"{name} buys {more} more.",
            )
            have = d.work(
                f"{have}+{more}", f"Now {name} has @.", "That makes @.", "After this there are @.", unit=things
            )
        else:
            less = d.number(1, int(have) - 1 if have < 120 else 119) if have > 1 else 1
            d.tell(
                f"{name} gives {less} to {friend}.",
                f"{friend} borrows {less} of them.",
                f"After that, {less} {things} are lost.",
            )
            have = d.work(f"{have}-{less}", "Then @ are left.", f"{name} keeps @.", "This leaves @.", unit=things)
    d.tell(
        f"How many {things} does {name} have in the end?",
        f"How many {things} are left for {name}?",
        "How many are there now?",
    )


def _shopping(d: _Draft) -> None:
    """Two purchases, paid with one note."""
    (name,), place = d.names(1), d.one(PLACES)
    first, second = d.rng.sample(THINGS, 2)
    a, b = d.number(2, 12), d.number(2, 12)
    p, q = d.number(1, 15), d.number(1, 15)
    d.tell(
        f"At the {place}, {name} buys {a} {first} for ${p} each and {b} {second} for ${q} each.",
        f"{name} goes to the {place} for {a} {first} at ${p} apiece and {b} {second} at ${q} apiece.",
    )
    left = d.work(f"{a}*{p}", f"The {first} cost @.", f"{name} pays @ for the {first}.", unit="$")
    right = d.work(f"{b}*{q}", f"The {second} cost @.", f"For the {second}, {name} pays @.", unit="$")
    total = d.work(f"{left}+{right}", "Together that is @.", "The whole purchase costs @.", unit="$")
    if d.rng.random() < 0.6:
        paid = (int(total) // 20 + d.number(1, 3)) * 20
        d.tell(
            f"{name} pays with ${paid}. How much change does {name} get?",
            f"How much is left of the ${paid} that {name} brought?",
        )
        d.work(f"{paid}-{total}", f"{name} gets back @.", "What is left is @.", unit="$")
    else:
        d.tell("How much does it cost in all?", f"How many dollars does {name} spend?")


def _compare(d: _Draft) -> None:
    """Amounts told by comparison with one another."""
    one, two, three = d.names(3)
    things, many = d.one(THINGS), d.number(4, 120, 2)
    factor = d.number(2, 6)
    d.tell(f"{one} owns {many} {things}.", f"There are {many} {things} in the collection of {one}.")
    if d.rng.random() < 0.5:
        d.tell(f"{two} has {factor} times as many as {one}.", f"The collection of {two} is {factor} times as large.")
        other = d.work(f"{many}*{factor}", f"{two} has @.", f"That gives {two} @.", unit=things)
    else:
        d.tell(f"{two} has half as many as {one}.", f"{two} owns only half of that number.")
        other = d.work(f"{many}/2", f"{two} has @.", "Half of that is @.", unit=things)
    more = d.number(2, 60)
    d.tell(f"{three} has {more} more than {two}.", f"{three} counts {more} more than {two} does.")
    last = d.work(f"{other}+{more}", f"{three} has @.", f"So {three} counts @.", unit=things)
    d.tell(f"How many {things} do the three have together?", f"What is the total number of {things}?")
    d.work(f"{many}+{other}+{last}", "All together they have @.", "The total is @.", unit=things)


def _wages(d: _Draft) -> None:
    """Pay by the hour over days, less an expense."""
    (name,), job = d.names(1), d.one(JOBS)
    rate, hours, days = d.number(6, 30), d.number(2, 9), d.number(2, 6)
    d.tell(f"{name} earns ${rate} an hour {job}.", f"For {job}, {name} is paid ${rate} per hour.")
    d.tell(
        f"{name} works {hours} hours a day for {days} days.", f"This week it was {hours} hours on each of {days} days."
    )
    total = d.work(f"{hours}*{days}", f"{name} works @.", "That is @ of work.", unit="hours")
    money = d.work(f"{total}*{rate}", "The pay is @.", f"{name} earns @.", unit="$")
    if d.rng.random() < 0.7:
        cost = d.number(5, min(60, int(money) - 1))
        d.tell(f"Tools cost {name} ${cost}.", f"Out of this, ${cost} goes to the bus fare.")
        d.work(f"{money}-{cost}", "After the expense @ remain.", f"{name} keeps @.", unit="$")
        d.tell(f"How much money does {name} keep?", "How many dollars are left?")
    else:
        d.tell(f"How much does {name} earn?", "How many dollars is that?")


def _sharing(d: _Draft) -> None:
    """Equal parts, then a change of one part."""
    (name,), things, people = d.names(1), d.one(THINGS), d.number(3, 12)
    share, extra = d.number(3, 30), d.number(1, 15)
    total = people * share
    d.tell(
        f"{name} divides {total} {things} equally among {people} children.",
        f"{people} neighbours share {total} {things} in equal parts, and {name} is one of them.",
    )
    part = d.work(f"{total}/{people}", "Each one gets @.", "One share is @.", unit=things)
    d.tell(
        f"One of them already had {extra}. How many {things} does that one have now?",
        f"One of them then picks up {extra} more {things}. How many does this one hold?",
    )
    d.work(f"{part}+{extra}", "With the others that makes @.", "This one ends up with @.", unit=things)


def _journey(d: _Draft) -> None:
    """Two legs at two speeds."""
    (name,), craft = d.names(1), d.one(VEHICLES)
    v, w, s, t = d.number(8, 90), d.number(8, 90), d.number(2, 7), d.number(2, 7)
    d.tell(
        f"{name} travels by {craft} at {v} miles per hour for {s} hours, then at {w} miles per hour for {t} hours.",
        f"A {craft} covers {v} miles an hour during the first {s} hours and {w} miles an hour during the next {t}.",
    )
    a = d.work(f"{v}*{s}", "The first part is @.", "First it goes @.", unit="miles")
    b = d.work(f"{w}*{t}", "The second part is @.", "Then it goes @.", unit="miles")
    d.tell("How many miles is the whole way?", "How far is that in all?")
    d.work(f"{a}+{b}", "The whole way is @.", "In all that is @.", unit="miles")


def _discount(d: _Draft) -> None:
    """A price cut by a percentage, times a number of pieces."""
    (name,), things, place = d.names(1), d.one(THINGS), d.one(PLACES)
    price, percent, count = d.number(10, 200, 5), d.number(5, 60, 5), d.number(2, 9)
    d.tell(
        f"The {place} sells a set of {things} for ${price} and takes {percent}% off today.",
        f"A set of {things} costs ${price} at the {place}, but there is a {percent}% discount.",
    )
    off = d.work(f"{price}*{percent}/100", "The discount is @.", f"{percent}% of ${price} is @.", unit="$")
    now = d.work(f"{price}-{_shown(off)}", "One set now costs @.", "The new price is @.", unit="$")
    d.tell(f"What does {name} pay for {count} sets?", f"{name} buys {count} sets. How many dollars is that?")
    d.work(f"{_shown(now)}*{count}", f"{count} sets cost @.", f"{name} pays @.", unit="$")


def _packing(d: _Draft) -> None:
    """Rows make a total, some are spoiled, the rest goes into containers."""
    things, holder, place = d.one(THINGS), d.one(HOLDERS), d.one(PLACES)
    size, full = d.number(4, 15), d.number(3, 20)
    rows = d.number(2, 12)
    per = -(-size * full // rows)
    spoiled = rows * per - size * full
    d.tell(
        f"At the {place} there are {rows} shelves with {per} {things} on each.",
        f"The {place} keeps {rows} rows of {per} {things}.",
    )
    total = d.work(f"{rows}*{per}", "At first there are @.", "All shelves hold @.", unit=things)
    if spoiled:
        d.tell(f"{spoiled} of them are broken and thrown away.", f"{spoiled} are sold.")
        total = d.work(f"{total}-{spoiled}", "After that @ remain.", "That leaves @.", unit=things)
    d.tell(
        f"The rest goes into {holder}s of {size}. How many {holder}s are filled?".replace("xs ", "xes "),
        f"How many times can one {holder} of {size} be filled with what is left?",
    )
    d.work(f"{total}/{size}", "They fill @.", "It takes @.", unit="fillings")


def _ages(d: _Draft) -> None:
    """Ages now and in some years."""
    one, two = d.names(2)
    age, gap, years = d.number(4, 50), d.number(2, 30), d.number(2, 25)
    d.tell(
        f"{one} is {age} years old, and {two} is {gap} years older.",
        f"{two} was born {gap} years before {one}, who is {age} now.",
    )
    other = d.work(f"{age}+{gap}", f"{two} is @ old.", f"Today {two} has lived @.", unit="years")
    if d.rng.random() < 0.5:
        d.tell(f"How old will {two} be in {years} years?")
        d.work(f"{other}+{years}", f"In {years} years {two} will be @ old.", "Then it will be @.", unit="years")
    else:
        d.tell(f"What will the sum of their ages be in {years} years?")
        sums = d.work(f"{age}+{other}", "Today their ages add up to @.", "The sum is now @.", unit="years")
        gained = d.work(f"2*{years}", "Both get older by @ together.", "The sum grows by @.", unit="years")
        d.work(f"{sums}+{gained}", "The sum will be @.", "Then it is @.", unit="years")


def _saving(d: _Draft) -> None:
    """Weeks until a goal is reached."""
    (name,), things = d.names(1), d.one(THINGS)
    weekly, weeks, have = d.number(3, 40), d.number(2, 20), d.number(2, 90)
    spend = d.number(1, weekly - 1)
    goal = have + (weekly - spend) * weeks
    d.tell(
        f"{name} wants a collection of {things} that costs ${goal} and has saved ${have}.",
        f"With ${have} in hand, {name} is saving for {things} worth ${goal}.",
    )
    d.tell(
        f"Every week {name} gets ${weekly} and spends ${spend} of it.",
        f"The weekly income is ${weekly}, of which ${spend} is spent.",
    )
    need = d.work(f"{goal}-{have}", f"{name} still needs @.", "What is missing is @.", unit="$")
    rate = d.work(f"{weekly}-{spend}", "Each week adds @.", f"{name} puts aside @ a week.", unit="$")
    d.tell("After how many weeks is there enough?", f"How many weeks does {name} have to wait?")
    d.work(f"{need}/{rate}", "This takes @.", f"{name} waits @.", unit="weeks")


def _recipe(d: _Draft) -> None:
    """Quarters and halves of cups, scaled."""
    (name,), food = d.names(1), d.one(FOODS)
    flour, water = (f"{d.number(0, 3)}.{d.rng.choice(('25', '5', '75'))}".removeprefix("0") for _ in range(2))
    batches = d.number(2, 12)
    d.tell(
        f"A pot of {food} needs {_lead(flour)} cups of flour and {_lead(water)} cups of water.",
        f"For one serving of {food}, {name} takes {_lead(flour)} cups of flour and {_lead(water)} cups of water.",
    )
    both = d.work(f"{flour}+{water}", "One portion takes @.", "That is @ each time.", unit="cups")
    d.tell(f"How many cups go into {batches} of them?", f"{name} makes {batches}. How many cups are used?")
    d.work(f"{batches}*{_shown(both)}", f"{batches} portions take @.", "All of them need @.", unit="cups")


def _fraction(d: _Draft) -> None:
    """A fraction of a group, and a percentage of the rest."""
    place, things = d.one(PLACES), d.one(THINGS)
    bottom = d.rng.choice((2, 3, 4, 5, 8))
    top = d.number(1, bottom - 1)
    total, percent = bottom * 20 * d.number(1, 12), d.rng.choice((10, 20, 25, 40, 50, 60, 75, 80))
    d.tell(
        f"The {place} received {total} {things}, and {top}/{bottom} of them were sold on {d.one(DAYS)}.",
        f"Of {total} {things} at the {place}, {top}/{bottom} are blue.",
    )
    sold = d.work(f"{total}*{top}/{bottom}", f"{top}/{bottom} of them are @.", "The first part is @.", unit=things)
    rest = d.work(f"{total}-{sold}", "The others are @.", "The rest is @.", unit=things)
    d.tell(
        f"{percent}% of the others are large. How many large ones are among them?",
        f"How many {things} are {percent}% of the rest?",
    )
    d.work(f"{rest}*{percent}/100", f"{percent}% of the rest is @.", "This comes to @.", unit=things)


def _machine(d: _Draft) -> None:
    """A rate per minute for hours, shared by several machines."""
    things, place = d.one(THINGS), d.one(PLACES)
    rate, minutes, machines = d.number(2, 25), d.number(10, 120, 5), d.number(2, 8)
    d.tell(
        f"A machine at the {place} makes {rate} {things} a minute and runs for {minutes} minutes.",
        f"In the {place}, one press turns out {rate} {things} every minute for {minutes} minutes.",
    )
    one = d.work(f"{rate}*{minutes}", "One machine makes @.", "A single one delivers @.", unit=things)
    d.tell(f"How many {things} do {machines} of them make?", f"What do {machines} such machines produce?")
    d.work(f"{one}*{machines}", f"{machines} machines make @.", "All of them deliver @.", unit=things)


def _shown(value: int | Fraction) -> str:
    return _decimal(Fraction(value))


def _lead(digits: str) -> str:
    return f"0{digits}" if digits.startswith(".") else digits


_FAMILIES: tuple[Callable[[_Draft], None], ...] = (
    _stock,
    _shopping,
    _compare,
    _wages,
    _sharing,
    _journey,
    _discount,
    _packing,
    _ages,
    _saving,
    _recipe,
    _fraction,
    _machine,
)
