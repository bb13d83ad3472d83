"""A study: policies trained, compared with the methods that need no training, and judged by bars set beforehand."""
