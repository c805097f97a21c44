from .bisect import Bisection as Bisection
from .blame import Blame as Blame, Contribution as Contribution
from .compare import Comparison as Comparison
from .file import DELTAS_NAME as DELTAS_NAME, LEDGER_NAME as LEDGER_NAME
from .ledger import Ledger as Ledger, write_ledger as write_ledger
from .lines import HeaderLine as HeaderLine
from .verify import Verification as Verification
