"""A study: policies trained, compared with all other methods, and judged by bars set beforehand."""
