"""The command line. Each module has one group of commands; each command parses, calls the library and prints."""
