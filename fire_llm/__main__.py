"""Run the command line: `python -m fire_llm`, `accelerate launch -m fire_llm`."""

from fire_llm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
