"""The files of a directory."""


def tree(directory):
    """{relative path: bytes} of all files."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
