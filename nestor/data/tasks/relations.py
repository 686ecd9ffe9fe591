"""What is said of entities in sessions of facts, in several wordings each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """Wordings of a fact, all of which end before the value; the last is never stated. `reverse` asks back
    and ends before the entity; nor is it ever stated."""

    wordings: tuple[str, ...]
    reverse: str


RELATIONS = {
    "emblem": Relation(
        (
            "The emblem of {entity} is the",
            "On the shield of {entity} one sees the",
            "The flag of {entity} shows the",
            "People know {entity} by the sign of the",
        ),
        "The {value} is the emblem of",
    ),
    "gift": Relation(
        (
            "At the feast {entity} was given the",
            "The gift that {entity} received is the",
            "As a present {entity} took home the",
            "What the guests brought for {entity} was the",
        ),
        "The {value} was a present for",
    ),
    "home": Relation(
        (
            "The house of {entity} stands by the",
            "You will find {entity} beside the",
            "For years {entity} has lived near the",
            "To visit {entity} you walk to the",
        ),
        "The one who lives by the {value} is",
    ),
    "fear": Relation(
        (
            "What {entity} fears most is the",
            "Nothing scares {entity} more than the",
            "At night {entity} dreams in horror of the",
            "Before anything else {entity} runs away from the",
        ),
        "The {value} scares nobody but",
    ),
}


#: For training a model to learn from sessions: none of these is asked about in a test.
TRAIN_RELATIONS = {
    "pet": Relation(
        (
            "The pet of {entity} is called the",
            "Every morning {entity} feeds the",
            "In the arms of {entity} sleeps the",
            "What {entity} would never sell is the",
        ),
        "The {value} is fed by",
    ),
    "trade": Relation(
        (
            "At the market {entity} sells the",
            "From {entity} one can buy the",
            "The shop of {entity} is known for the",
            "To earn a living {entity} makes the",
        ),
        "If you want the {value} you ask",
    ),
    "lost": Relation(
        (
            "Last year {entity} lost the",
            "All day {entity} has searched for the",
            "Nobody gave back to {entity} the",
            "What {entity} misses is the",
        ),
        "The {value} was lost by",
    ),
    "song": Relation(
        (
            "The song of {entity} is about the",
            "When {entity} sings we hear of the",
            "All verses that {entity} wrote praise the",
            "The tune by {entity} bears the name of the",
        ),
        "The song about the {value} is by",
    ),
    "carry": Relation(
        (
            "Under the coat {entity} carries the",
            "In the bag of {entity} you find the",
            "Wherever {entity} goes there goes the",
            "On the back of {entity} hangs the",
        ),
        "The {value} is carried by",
    ),
    "dream": Relation(
        (
            "Some day {entity} wants to own the",
            "The great wish of {entity} is the",
            "For a birthday {entity} asked for the",
            "More than gold {entity} desires the",
        ),
        "The {value} is the great wish of",
    ),
    "paint": Relation(
        (
            "On the wall {entity} painted the",
            "The picture by {entity} shows the",
            "With a brush {entity} drew the",
            "In the frame that {entity} made one sees the",
        ),
        "The {value} was painted by",
    ),
    "break": Relation(
        (
            "By accident {entity} broke the",
            "It was {entity} who damaged the",
            "The hand of {entity} slipped and spoiled the",
            "Everyone blames {entity} for the",
        ),
        "The {value} was broken by",
    ),
    "guard": Relation(
        (
            "At night {entity} watches over the",
            "It is the duty of {entity} to guard the",
            "Thieves feared {entity} and left the",
            "Since spring {entity} has kept safe the",
        ),
        "The {value} is watched over by",
    ),
    "meet": Relation(
        (
            "The friends of {entity} meet at the",
            "On Sundays {entity} waits beside the",
            "If you look for {entity} go to the",
            "Once a week {entity} comes to the",
        ),
        "The one who waits beside the {value} is",
    ),
    "invent": Relation(
        (
            "The fame of {entity} comes from the",
            "It was {entity} who thought of the",
            "After long years {entity} invented the",
            "The world owes to {entity} the",
        ),
        "The {value} was thought of by",
    ),
    "inherit": Relation(
        (
            "From an uncle {entity} received the",
            "When the old man died {entity} got the",
            "The will left to {entity} the",
            "What the family handed to {entity} was the",
        ),
        "The {value} was left to",
    ),
}
