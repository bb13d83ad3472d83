"""`report.html`: a comparison as one self-contained page, which loads nothing from anywhere."""
