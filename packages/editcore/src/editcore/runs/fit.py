"""Checks whether an editor, a backend and the requests fit together, before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from editcore.interfaces.errors import HParamsError, RequestError
from editcore.interfaces.specs import EditorSpec
from editcore.interfaces.values import EditRequest
from editcore.plugins.registry import Plugins
from editcore.settings.hparams import HParams

__all__ = [
    "MissingSettingError",
    "UnfitError",
    "check_fit",
    "check_savable",
    "check_subjects",
    "needs_subject",
    "refuse_contradictions",
    "refuse_duplicates",
    "subject_refusal",
    "with_needed_parts",
]

_DEFAULT_BACKEND = "raw"


class UnfitError(HParamsError):
    """An editor cannot work with the model, the backend or the data of a run. Another editor may be able to."""


class MissingSettingError(UnfitError):
    """An editor requires a hyperparameter that neither a preset nor the settings give."""

    def __init__(self, problem: str, way_out: str, *, setting: str, example: str) -> None:
        super().__init__(f"{problem} {way_out}")
        self.problem = problem
        """What is missing, as a sentence."""
        self.setting = setting
        """Name of the hyperparameter."""
        self.example = example
        """A value of its type, as TOML."""


def with_needed_parts(
    plugins: Plugins, editor: str, extensions: Sequence[str], backend: str | None
) -> tuple[tuple[str, ...], str]:
    """Extensions and backend of a run, with those that the editor needs.

    Args:
        extensions: as they were asked for; needed ones are added after them.
        backend: as it was asked for, or ``None``.

    Raises:
        UnfitError: another backend was asked for than the one the editor needs.
        UnknownNameError: there is no such editor.
    """
    needs = plugins.editor(editor).capabilities
    if needs.needs_backend is not None and backend not in (None, needs.needs_backend):
        raise UnfitError(
            f"The editor '{editor}' works with the backend '{needs.needs_backend}' only; '{backend}' was asked for. "
            "Leave --backend out."
        )
    more = tuple(name for name in needs.needs_plugins if name not in extensions)
    return (*extensions, *more), backend or needs.needs_backend or _DEFAULT_BACKEND


def refuse_duplicates(option: str, names: Sequence[str]) -> None:
    """Refuse a list that has a name twice.

    Raises:
        HParamsError: a name is in the list twice.
    """
    if len(set(names)) < len(names):
        options = " ".join(f"--{option} {name}" for name in names)
        raise HParamsError(f"{'An' if option[0] in 'aeiou' else 'A'} {option} is named twice: {options}.")


def refuse_contradictions(requests: Iterable[EditRequest], *, together: str = "one batch") -> None:
    """Refuse requests that ask for one fact twice, whether with one target or with two.

    Args:
        together: what they come in, for the message.

    Raises:
        RequestError: two requests are about the same fact.
    """
    facts: dict[tuple[str, str], EditRequest] = {}
    for request in requests:
        if (other := facts.get(request.fact_key)) is not None:
            if other.continuation == request.continuation:
                raise RequestError(f"A request is twice in {together}: '{request.text}' → '{request.target_new}'.")
            raise RequestError(
                f"Two requests of {together} contradict each other: '{request.text}' → '{other.target_new}' and → "
                f"'{request.target_new}'. Keep one of them, or put them into different batches."
            )
        facts[request.fact_key] = request


def check_fit(plugins: Plugins, editor: str, backend: str) -> None:
    """Refuse an editor whose proposals the backend cannot hold.

    Raises:
        UnfitError: the editor gives changes that the backend does not take.
        UnknownNameError: there is no such editor or backend.
    """
    gives, takes = plugins.editor(editor).capabilities.gives, plugins.backend(backend).takes
    if missing := sorted(gives - takes):
        fitting = sorted(name for name, spec in plugins.backends().items() if gives <= spec.takes)
        way_out = f"Choose --backend {' or '.join(fitting)}." if fitting else "No installed backend does."
        raise UnfitError(
            f"The editor '{editor}' gives changes that the backend '{backend}' does not take: {', '.join(missing)}. "
            f"{way_out}"
        )


def check_savable(plugins: Plugins, editor: str, backend: str) -> None:
    """Refuse ``--save`` if some edits will be kept outside the weights.

    Raises:
        HParamsError: the editor keeps them beside the weights, or the backend does not write them.
    """
    if "attachment" in plugins.editor(editor).capabilities.gives:
        raise HParamsError(
            f"--save: the editor '{editor}' keeps its edits beside the weights, and a folder of weights has no place "
            "for them. Leave --save out; 'editctl generate' runs the edited model."
        )
    if not plugins.backend(backend).writes_weights:
        raise HParamsError(
            f"--save: the backend '{backend}' does not keep edits in weights, so there is no edited model to write. "
            "Leave --save out, or choose another backend, such as --backend raw."
        )


def needs_subject(editor: EditorSpec, hparams: HParams | None) -> bool:
    """Whether an editor needs a subject in every request.

    Args:
        hparams: its settings, which may decide; ``None``: as it is announced.
    """
    own = None if hparams is None else hparams.needs_subject
    return editor.capabilities.needs_subject if own is None else own


def subject_refusal(editor: EditorSpec, hparams: HParams | None = None) -> Callable[[EditRequest], str | None]:
    """A function that tells why an editor cannot take a request (it needs a subject and the request has none), or
    returns ``None`` if it can."""

    def refuse(request: EditRequest) -> str | None:
        if request.subject or not needs_subject(editor, hparams):
            return None
        return f"It names no subject, and the editor '{editor.name}' needs one in every request."

    return refuse


def check_subjects(requests: Sequence[EditRequest], editor: EditorSpec, hparams: HParams | None = None) -> None:
    """Refuse requests without a subject where the editor looks subjects up.

    Raises:
        RequestError: a request has no subject.
    """
    if needs_subject(editor, hparams):
        without = [request for request in requests if not request.subject]
        if without:
            raise RequestError(
                f"The editor '{editor.name}' needs a subject in every request; {len(without)} of {len(requests)} have "
                f"none, the first being '{without[0].text}'. Name it and put {{}} in its place in the prompt."
            )
