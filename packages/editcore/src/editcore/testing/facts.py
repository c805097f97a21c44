"""Facts whose words the tiny tokenizer knows. This module imports neither torch nor transformers."""

from __future__ import annotations

from editcore.interfaces.values import EditRequest, FactRecord, Probe

__all__ = ["RELATIONS", "SUBJECTS", "three_facts", "tiny_records", "tiny_requests"]

SUBJECTS = (
    "Marie Curie", "Isaac Newton", "Ada Lovelace", "Alan Turing", "Rosa Parks", "Niels Bohr", "Emmy Noether",
    "Leonhard Euler", "Grace Hopper", "Max Planck", "Jane Austen", "Victor Hugo", "Frida Kahlo", "Claude Monet",
    "Nina Simone", "Bob Dylan", "Greta Garbo", "Bruce Lee", "Diego Rivera", "Sophie Germain",
)  # fmt: skip
RELATIONS = (
    ("{} was born in", ("Paris", "London", "Rome", "Berlin", "Madrid", "Vienna")),
    ("The mother tongue of {} is", ("French", "English", "Italian", "German", "Spanish", "Polish")),
    ("{} works as a", ("painter", "doctor", "singer", "lawyer", "teacher", "pilot")),
    ("{} plays the sport of", ("tennis", "football", "hockey", "chess", "rugby", "golf")),
)


def three_facts() -> tuple[EditRequest, ...]:
    """Three requests about three people and three relations."""
    return tiny_requests(3)


def tiny_requests(n: int) -> tuple[EditRequest, ...]:
    """``n`` requests that do not contradict each other, each with a ``target_true``; at most 80.

    >>> tiny_requests(1)[0].text
    'Marie Curie was born in'
    """
    most = len(SUBJECTS) * len(RELATIONS)
    if not 0 <= n <= most:
        raise ValueError(f"there are {most} tiny requests, asked for {n}")
    return tuple(_request(index) for index in range(n))


def _request(index: int) -> EditRequest:
    # Subject and relation both change from one request to the next; the round shifts their pairing.
    number, turn = index % len(SUBJECTS), index // len(SUBJECTS)
    prompt, targets = RELATIONS[(index + turn) % len(RELATIONS)]
    return EditRequest(
        subject=SUBJECTS[number],
        prompt=prompt,
        target_new=targets[index % len(targets)],
        target_true=targets[(index + 1 + turn) % len(targets)],
        id=f"tiny-{index}",
    )


def tiny_records(n: int) -> tuple[FactRecord, ...]:
    """The facts of :func:`tiny_requests` as records, with two probes of every usual kind and an opening to go on from.

    >>> sorted({probe.kind.partition(".")[0] for probe in tiny_records(1)[0].probes})
    ['generation', 'locality', 'multihop', 'neighborhood', 'paraphrase', 'portability']
    """
    return tuple(
        FactRecord(request=request, relation=request.prompt, probes=_probes(request, number))
        for number, request in enumerate(tiny_requests(n))
    )


def _probes(request: EditRequest, number: int) -> tuple[Probe, ...]:
    assert request.target_true is not None
    new, true = (request.target_new,), (request.target_true,)
    others = [SUBJECTS[(number + step) % len(SUBJECTS)] for step in (1, 2)]
    asked = [
        *(("paraphrase", f"{opening} {request.text}", new) for opening in ("It is known that", "It is a city where")),
        *(("neighborhood", request.prompt.replace("{}", other), true) for other in others),
        *(("portability.reasoning", f"{other} knows that {request.text}", new) for other in others),
        *(("multihop", f"The city of {other} and what {request.text}", new) for other in others),
        *(("locality.relation_specificity", f"The capital of {other} is", true) for other in others),
        ("generation", request.subject, ()),
    ]
    return tuple(Probe(kind=kind, prompt=prompt, answers=answers) for kind, prompt, answers in asked)
