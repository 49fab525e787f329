"""`python -m arrcoc`: the command line."""

from arrcoc.cli import app

if __name__ == "__main__":
    app(prog_name="arrcoc")
