"""Small real tasks that train in seconds, for examples, tests and first steps."""
