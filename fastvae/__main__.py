import sys

from fastvae.cli import main

sys.exit(main())
