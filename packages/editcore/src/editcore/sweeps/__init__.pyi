from .comparison import make_comparison as make_comparison
from .file import (
    STUDY as STUDY,
    UNEDITED as UNEDITED,
    Arm as Arm,
    FigureSpec as FigureSpec,
    Sweep as Sweep,
    SweepFile as SweepFile,
    load_study as load_study,
    load_sweep as load_sweep,
)
from .plan import (
    PLAN_NAME as PLAN_NAME,
    SWEEP_NAME as SWEEP_NAME,
    Plan as Plan,
    Point as Point,
    Trial as Trial,
    make_plan as make_plan,
)
from .records import Failure as Failure, PlanRecord as PlanRecord, SweepRecord as SweepRecord
from .run import SweepResult as SweepResult, Watch as Watch, run_sweep as run_sweep
from .state import (
    FAILURES_NAME as FAILURES_NAME,
    STATE_NAME as STATE_NAME,
    State as State,
    failure_of as failure_of,
    state_of as state_of,
    trial_directory as trial_directory,
)
