"""Synthetic tasks that measure and train memory: recall in real text, associative recall of tokens,
needles, formal languages."""

from nestor.data.tasks.facts import TEMPLATES, Fact, FactsPage, FactSpec, facts_page
from nestor.data.tasks.formal_languages import LANGUAGES, FormalBatch, FormalLanguage, formal_language
from nestor.data.tasks.haystack import CorpusHaystack, Haystack, RepeatedHaystack
from nestor.data.tasks.mqar import MqarTask
from nestor.data.tasks.needle import NEEDLE_KINDS, Needle, Secret, draw_secrets, needle
from nestor.data.tasks.recall import RecallProbe, RecallTask
from nestor.data.tasks.sessions import FillerText, Session, SessionFact, SessionSpec, gap_text
from nestor.data.tasks.stream import Answer, Task, TaskDocument, TaskStream

__all__ = [
    "LANGUAGES",
    "NEEDLE_KINDS",
    "TEMPLATES",
    "Answer",
    "CorpusHaystack",
    "Fact",
    "FactSpec",
    "FactsPage",
    "FillerText",
    "FormalBatch",
    "FormalLanguage",
    "Haystack",
    "MqarTask",
    "Needle",
    "RecallProbe",
    "RecallTask",
    "RepeatedHaystack",
    "Secret",
    "Session",
    "SessionFact",
    "SessionSpec",
    "Task",
    "TaskDocument",
    "TaskStream",
    "draw_secrets",
    "facts_page",
    "formal_language",
    "gap_text",
    "needle",
]
