"""A study: policies trained, compared with all other methods, and held against criteria set beforehand."""
