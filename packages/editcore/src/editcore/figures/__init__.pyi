from .forgetting import forgetting_figure as forgetting_figure, forgetting_runs_figure as forgetting_runs_figure
from .layers import layers_figure as layers_figure, tracing_figure as tracing_figure
from .runs import draw_run as draw_run
from .scores import per_relation_figure as per_relation_figure, summary_figure as summary_figure
from .studies import (
    Estimate as Estimate,
    Series as Series,
    bars_figure as bars_figure,
    curves_figure as curves_figure,
    lines_figure as lines_figure,
)
from .style import AFTER as AFTER, BEFORE as BEFORE, new_figure as new_figure, png as png, save as save
