"""Fact records from files and registered data sets. Nothing here imports torch."""

from __future__ import annotations

from editcore.datasets._check import check_records, check_requests
from editcore.datasets._formats import parse_record
from editcore.datasets._known import KnownFact, load_known_facts
from editcore.datasets._load import load_records, load_worldfacts

__all__ = [
    "KnownFact",
    "check_records",
    "check_requests",
    "load_known_facts",
    "load_records",
    "load_worldfacts",
    "parse_record",
]
