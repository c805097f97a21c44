from .make import PAGE_NAME as PAGE_NAME
from .make import REPORT_NAME as REPORT_NAME
from .make import Report as Report
from .make import make_report as make_report
