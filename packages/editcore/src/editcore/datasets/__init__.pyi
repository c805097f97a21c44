from .check import check_records as check_records, check_requests as check_requests
from .fields import Fields as Fields
from .findings import Finding as Finding, Findings as Findings, findings_in as findings_in
from .form import Format as Format
from .formats import FORMAT as FORMAT, parse_record as parse_record
from .known import KnownFact as KnownFact, load_known_facts as load_known_facts
from .load import (
    Selection as Selection,
    content_hash as content_hash,
    load_records as load_records,
    load_worldfacts as load_worldfacts,
)
from .names import (
    dataset_name as dataset_name,
    dataset_settings as dataset_settings,
    is_path as is_path,
    short_name as short_name,
)
from .profiles import ProfilesHParams as ProfilesHParams, load_profiles as load_profiles
from .published import Published as Published, find_published as find_published, published_files as published_files
from .pulling import Pulled as Pulled, pull_file as pull_file
