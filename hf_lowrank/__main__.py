"""`python -m hf_lowrank`, and so `accelerate launch -m hf_lowrank`, is the command `hf-lowrank`."""

import sys

from hf_lowrank.cli import main

if __name__ == "__main__":
    sys.exit(main())
