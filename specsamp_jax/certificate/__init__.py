"""A certificate for verification rules: drawn laws beside enumerated ones, and checks of keys, rows and boundaries."""
