"""`forge-intents`: generated utterances of twelve intents, this project's own.

The phrasings of training, validation and test are disjoint, so that accuracy on the test rows says something about
new wordings. Slots (rooms, times, dishes, ...) are shared by all splits. Row n of a split is the same on every machine.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

NAME = "forge-intents"
SPLITS = ("train", "val", "test")
# Rows of each label in each split: enough to learn from in a minute, and a test that moves by less than half a percent.
ROWS_PER_LABEL = {"train": 120, "val": 15, "test": 25}

_SLOT = re.compile(r"\{(\w+)\}")
_SLOTS: dict[str, tuple[str, ...]] = {
    "room": ("kitchen", "hall", "attic", "cellar", "bedroom", "study", "garage", "porch", "nursery", "bathroom"),
    "time": ("six", "half past seven", "noon", "nine in the morning", "five", "ten tonight", "a quarter to eight"),
    "day": ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday", "tomorrow", "today"),
    "city": ("lisbon", "tampere", "graz", "cork", "ghent", "turin", "malaga", "bergen", "leipzig", "split", "porto"),
    "dish": ("lentil soup", "pancakes", "goulash", "paella", "dumplings", "rhubarb cake", "ramen", "shakshuka"),
    "name": ("amina", "boris", "chloe", "diego", "elif", "freya", "gabor", "hanna", "ibrahim", "jelena", "kofi"),
    "amount": ("twelve", "forty", "ninety five", "two hundred", "sixty", "eight", "three hundred and ten"),
    "genre": ("jazz", "folk", "techno", "opera", "reggae", "swing", "chamber music", "blues", "ska"),
    "language": ("finnish", "portuguese", "turkish", "basque", "korean", "welsh", "swahili", "greek"),
    "word": ("bridge", "spoon", "thunder", "harvest", "ticket", "neighbour", "window", "cheese"),
    "thing": ("umbrella", "kettle", "bicycle lamp", "backpack", "desk chair", "tent", "headphones", "raincoat"),
}
# Per intent and split: phrasings with slots. No phrasing is in two splits.
_PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "lights": {
        "train": (
            "turn on the lights in the {room}",
            "switch the {room} light off",
            "make it brighter in the {room}",
            "dim the lamp in the {room} please",
            "the {room} is too dark, light it up",
            "lights off in the {room}",
            "can you turn the {room} lights down",
            "i need some light in the {room}",
        ),
        "val": ("please light the {room}", "kill the lights in the {room}"),
        "test": (
            "put the {room} light on",
            "could the lamp in the {room} be dimmed",
            "no more light in the {room} please",
        ),
    },
    "alarm": {
        "train": (
            "set an alarm for {time}",
            "wake me up at {time}",
            "i have to get up at {time} on {day}",
            "put my alarm clock on {time}",
            "alarm at {time} {day} please",
            "cancel the alarm at {time}",
            "make sure i am awake by {time}",
            "ring the alarm {day} at {time}",
        ),
        "val": ("let the alarm go off at {time}", "wake me {day} at {time}"),
        "test": ("i want to wake up at {time}", "new alarm, {day}, {time}", "have the alarm ring at {time}"),
    },
    "weather": {
        "train": (
            "what is the weather like in {city}",
            "will it rain in {city} on {day}",
            "how cold does it get in {city}",
            "weather forecast for {day}",
            "is it sunny in {city}",
            "tell me the temperature in {city}",
            "do i need an umbrella for the rain on {day}",
            "any snow expected in {city}",
        ),
        "val": ("give me the forecast for {city}", "does it rain in {city}"),
        "test": (
            "how is the weather in {city} {day}",
            "is rain expected in {city}",
            "what temperature will it be {day}",
        ),
    },
    "recipe": {
        "train": (
            "how do i cook {dish}",
            "find me a recipe for {dish}",
            "what goes into {dish}",
            "teach me to make {dish}",
            "which ingredients do i need for {dish}",
            "show a simple recipe with {dish}",
            "how long does {dish} cook",
            "i would like to bake or cook {dish}",
        ),
        "val": ("what do i need to cook {dish}", "recipe of {dish} please"),
        "test": ("how is {dish} made, i want to cook it", "ingredients for {dish}", "look up a {dish} recipe"),
    },
    "transfer": {
        "train": (
            "send {amount} euros to {name}",
            "transfer {amount} dollars to the account of {name}",
            "pay {name} {amount} euros",
            "move {amount} to my savings account",
            "i owe {name} {amount}, please pay it",
            "make a payment of {amount} to {name}",
            "wire {amount} euros to {name} on {day}",
            "give {name} {amount} from my account",
        ),
        "val": ("please transfer {amount} to {name}", "pay {amount} euros to {name}"),
        "test": (
            "{name} should get {amount} euros from my account",
            "send a payment to {name}, {amount} dollars",
            "transfer money to {name}: {amount}",
        ),
    },
    "balance": {
        "train": (
            "how much money is in my account",
            "what is my balance",
            "show the balance of my savings account",
            "how much did i spend on {day}",
            "can i afford {amount} euros",
            "is there enough money for {amount} euros",
            "tell me what is left in my account",
            "account balance on {day}",
        ),
        "val": ("how much money do i have", "balance of my account please"),
        "test": ("what is left of my money", "check my account balance", "do i have more than {amount} in the account"),
    },
    "music": {
        "train": (
            "play some {genre}",
            "i want to listen to {genre}",
            "put on a {genre} playlist",
            "next song please",
            "stop the music in the {room}",
            "play the newest {genre} album",
            "turn the {genre} song up",
            "start my {genre} station in the {room}",
        ),
        "val": ("let me hear {genre}", "play a {genre} song"),
        "test": ("some {genre} music would be nice", "can you play {genre} in the {room}", "skip this {genre} song"),
    },
    "translate": {
        "train": (
            "how do you say {word} in {language}",
            "translate {word} into {language}",
            "what is {word} in {language}",
            "give me the {language} word for {word}",
            "i need {word} in {language}",
            "what does {word} mean in {language}",
            "say {word} in {language} please",
            "tell me the {language} translation of {word}",
        ),
        "val": ("translate {word} to {language}", "the {language} for {word} please"),
        "test": (
            "how would someone say {word} in {language}",
            "{word} translated into {language}",
            "which {language} word means {word}",
        ),
    },
    "travel": {
        "train": (
            "book a train to {city} on {day}",
            "find a flight to {city}",
            "i want to travel to {city} {day}",
            "how do i get to {city}",
            "two tickets from {city} to the coast",
            "when does the bus to {city} leave",
            "reserve a seat to {city} for {day}",
            "is there a night train to {city}",
        ),
        "val": ("get me a ticket to {city}", "when does the train to {city} leave"),
        "test": (
            "i need to travel to {city} by train",
            "book me a flight to {city} for {day}",
            "which bus leaves for {city} on {day}",
        ),
    },
    "calendar": {
        "train": (
            "add a meeting with {name} on {day}",
            "what is on my calendar for {day}",
            "move my appointment to {day}",
            "schedule lunch with {name} at {time}",
            "am i free on {day} at {time}",
            "cancel the meeting with {name}",
            "when do i meet {name}",
            "put the dentist into my calendar for {day}",
        ),
        "val": ("schedule a meeting with {name}", "show my calendar for {day}"),
        "test": (
            "do i have a meeting on {day}",
            "make an appointment with {name} {day} at {time}",
            "delete my meeting with {name} from the calendar",
        ),
    },
    "message": {
        "train": (
            "text {name} that i am late",
            "write a message to {name}",
            "tell {name} i will be there at {time}",
            "read my new messages",
            "send {name} a note about {day}",
            "reply to {name} with yes",
            "let {name} know that dinner is at {time}",
            "call {name} back",
        ),
        "val": ("send a text to {name}", "message {name} that i come at {time}"),
        "test": ("drop {name} a message", "let {name} know i am late", "did {name} reply to my text"),
    },
    "order": {
        "train": (
            "order a new {thing}",
            "buy me the {thing} online",
            "where is my parcel with the {thing}",
            "i want to return the {thing}",
            "put the {thing} into my shopping cart",
            "how much does the {thing} cost",
            "has the {thing} been shipped",
            "track the order of the {thing}",
        ),
        "val": ("i would like to order the {thing}", "when is the {thing} delivered"),
        "test": (
            "please buy the {thing}",
            "is my order of the {thing} shipped yet",
            "what is the price of the {thing}",
        ),
    },
}


def generate_intents(*, seed: int) -> Iterator[dict[str, object]]:
    """Yield every row as `text`, `intent` and `split`, without repeating a text."""
    for split in SPLITS:
        for intent, phrases in _PHRASES.items():
            yield from _rows(intent, split, phrases[split], seed)


def _rows(intent: str, split: str, phrases: tuple[str, ...], seed: int) -> Iterator[dict[str, object]]:
    rng = random.Random(f"{NAME}/{seed}/{intent}/{split}")  # noqa: S311 - utterances, not secrets
    seen: set[str] = set()
    # Phrasings without slots run out; ten tries a row are plenty for the others.
    for attempt in range(10 * ROWS_PER_LABEL[split]):
        if len(seen) == ROWS_PER_LABEL[split]:
            return
        text = _SLOT.sub(lambda slot: rng.choice(_SLOTS[slot[1]]), phrases[attempt % len(phrases)])
        if text not in seen:
            seen.add(text)
            yield {"text": text, "intent": intent, "split": split}
