"""Sweeps: a run with variations, planned, run on an executor, and put into tables and figures.

>>> from editcore import Plugins
>>> from editcore.execution.executors import make_executor
>>> plugins = Plugins.load()
>>> plan = make_plan(load_sweep(Path("sweep.toml")), plugins)  # doctest: +SKIP
>>> run_sweep(plan, Path("runs/sweep"), executor=make_executor(plugins, "local", {}))  # doctest: +SKIP
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
