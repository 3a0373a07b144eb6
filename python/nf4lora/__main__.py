"""`python -m nf4lora`: the command line without its entry point."""

import sys

from nf4lora.cli import main

sys.exit(main())
