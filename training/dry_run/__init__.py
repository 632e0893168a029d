"""`train --dry-run`: a recipe end to end, small, with stand-ins for what is not here."""
