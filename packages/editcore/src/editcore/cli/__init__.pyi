from .console import TerminalProgress as TerminalProgress, make_console as make_console, print_table as print_table
from .lazy import loaded_plugins as loaded_plugins

def main() -> None: ...
