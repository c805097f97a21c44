"""Announces the executor ``ray``; imports neither torch nor ray."""

from editcore import ExecutorSpec, hookimpl


@hookimpl
def editcore_executors() -> list[ExecutorSpec]:
    """The executor, with its hyperparameters."""
    return [
        ExecutorSpec(
            "ray",
            "edit_ray.executor:RayExecutor",
            hparams="edit_ray.hparams:RayHParams",
            summary="Workers of a Ray cluster, on this machine or on many.",
        )
    ]
