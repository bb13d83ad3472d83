"""What the published implementations computed, and the checks that read it: one module per group of families.

A module names its checks by the prefix of the golden files it reads: `FAMILIES` maps a prefix to a check of one case,
`FILES` a prefix to a check of a file without cases. The longest prefix that fits a file is its family.
"""
