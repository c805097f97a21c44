"""Announces all of them; imports no torch."""

from editcore import DatasetSpec, EvaluatorSpec, ExtensionSpec, MetricSpec, hookimpl

HPARAMS = "edit_broken.hparams:{}HParams"

COST = MetricSpec(name="cost", label="Cost", unit="nats", better="lower")
LIKELY = MetricSpec(name="likely", label="Likely", retention=True, tally="are likely")
CHEAPER = MetricSpec(name="cheaper", label="Cheaper")
NEVER = MetricSpec(name="never", label="Never", needs="what nobody has")
WORDING = MetricSpec(name="wording", label="Wording", unit="nats")


def balance(function: str) -> MetricSpec:
    """What two of them make together."""
    combine = f"edit_broken.asking:{function}"
    return MetricSpec(name="balance", label="Balance", of=("likely", "cheaper"), combine=combine)


def evaluator(name: str, *more: MetricSpec, target: str = "", compares: bool = True) -> EvaluatorSpec:
    """One that is called like its class, unless another is named."""
    return EvaluatorSpec(
        name,
        f"edit_broken.asking:{target or name.capitalize()}",
        hparams=HPARAMS.format("Asking"),
        summary="Asks what the new object costs.",
        metrics=(COST, LIKELY, *(more or (CHEAPER, balance("smaller")))),
        compares=compares,
    )


@hookimpl
def editcore_evaluators() -> list[EvaluatorSpec]:
    """Two that keep the contract, and others."""
    classes = (
        "honest", "secret", "boastful", "endless", "nosy", "moody", "training", "turning", "careless", "crashing",
        "demanding", "enriched", "keeping", "wordy",
    )  # fmt: skip
    return [
        *(evaluator(name) for name in classes),
        evaluator("unsaid", CHEAPER, WORDING),
        evaluator("alone", NEVER, compares=False),
        evaluator("silent", CHEAPER, NEVER, target="Honest"),
        evaluator("dividing", CHEAPER, balance("harmonic"), target="Honest"),
        evaluator("subtracting", CHEAPER, balance("difference"), target="Honest"),
        evaluator("uncomparing", NEVER, target="Alone"),
        evaluator("comparing", target="Honest", compares=False),
    ]


@hookimpl
def editcore_datasets() -> list[DatasetSpec]:
    """Two that keep the contract, and others."""
    functions = (
        "honest", "subclassed", "passing", "empty", "repeated", "tuples", "shuffled", "drawn", "open_places", "blank",
    )  # fmt: skip
    facts = HPARAMS.format("Facts")
    return [
        *(
            DatasetSpec(
                name.replace("_", "-"),
                f"edit_broken.data:{name}",
                hparams=facts,
                argument="count",
                summary="Tiny facts.",
            )
            for name in functions
        ),
        DatasetSpec("misnamed", "edit_broken.data:honest", hparams=facts, argument="number", summary="Tiny facts."),
        DatasetSpec("without-settings", "edit_broken.data:without_settings", summary="Two tiny facts."),
    ]


@hookimpl
def editcore_extensions() -> list[ExtensionSpec]:
    """Two that keep the contract, and others."""
    classes = (
        "honest", "settling", "unmarked", "leaky", "shouting", "inexact", "inventing", "random", "measured",
        "deaf", "final", "newborn", "counting",
    )  # fmt: skip
    companion = HPARAMS.format("Companion")
    return [
        *(
            ExtensionSpec(
                name,
                f"edit_broken.companions:{name.capitalize()}",
                hparams=companion,
                summary="Goes along.",
                settles_conflicts=name == "settling",
            )
            for name in classes
        ),
        ExtensionSpec(
            "unsettling",
            "edit_broken.companions:Honest",
            hparams=companion,
            summary="Says that it settles conflicts.",
            settles_conflicts=True,
        ),
    ]
