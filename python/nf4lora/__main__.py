"""`python -m nf4lora`: the command line without its entry point."""

import sys

from nf4lora.cli.main import main

sys.exit(main())
