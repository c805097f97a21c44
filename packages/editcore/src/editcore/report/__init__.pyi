from .make import PAGE_NAME as PAGE_NAME, REPORT_NAME as REPORT_NAME, Report as Report, make_report as make_report
