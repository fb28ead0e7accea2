"""The publisher of updates: a repository of static, signed files that any web server or USB stick can serve."""
