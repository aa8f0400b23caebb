"""The command line: each module has one group of commands; each command parses, calls the library and prints."""
