"""A campaign of kills, faults, hostile files and hostile requests against medgen: `make campaign`, see __main__.py."""
