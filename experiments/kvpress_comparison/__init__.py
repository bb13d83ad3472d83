"""Methods that kvpress has too, side by side: kept sets, KL, scores, bytes, time."""
