"""Which matrices an architecture has, and how long a text it reads."""
